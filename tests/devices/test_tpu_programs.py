"""Real TPU programs, compiled by libtpu without a TPU: they fit, exchange and call kernels."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import pytest
import small_families
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff import cli
from jaxdiff.devices import compilation, parallel, program_text, slices
from jaxdiff.models.attention import attention
from jaxdiff.models.layers import ResnetBlock2D
from jaxdiff.request import Options
from pipelines import slice_program
from pipelines.generate_options import Models
from pipelines.slice_program import Task

pytestmark = pytest.mark.tpu_aot
MESHES = {"data=4": False, "data=2,model=2": True}  # whether anything is exchanged
SIMILAR = ("FLUX.1 schnell", "Stable Diffusion 3 without T5")  # to others in their family
FAMILIES = [name for name in small_families.SMALL if name not in SIMILAR]
ROW = {"width": 64, "height": 64, "steps": 3, "guidance_scale": 2.0, "sampler": "euler"}


@pytest.fixture(scope="module", autouse=True)
def _as_in_a_process_of_its_own():
    """Sets what `slice_report` sets for the process that compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        jax.config.update("jax_enable_compilation_cache", False)
        yield
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns a checkpoint whose programs compile in seconds."""
    folder = tmp_path_factory.mktemp("small") / "pixart"
    return small_families.save(small_families.PIXART, folder)


OWN = ("batch_size", "most", "target", "row")


def task(model, mesh: str, **changes) -> Task:
    options = {name: value for name, value in changes.items() if name not in OWN}
    said = {"batch_size": 1, "target": "tpu-v5e:2x2", "row": ROW}
    said |= {name: value for name, value in changes.items() if name in OWN}
    options = asdict(Options(dtype="bfloat16", mesh=mesh, **options))
    return Task(models=asdict(Models(str(model))), options=options, **said)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["Stable Diffusion", *FAMILIES])
def test_every_family_compiles_for_a_slice(name, mesh, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint
    if name in small_families.SMALL:
        model = small_families.save(small_families.SMALL[name], tmp_path / "small")
    row = ROW | {"strength": 1.0} if "Edit" in name else ROW  # it begins with an image
    found = slice_program.account(task(model, mesh, row=row))
    assert bool(found["exchanges"]) == MESHES[mesh]
    assert found["cycles"]["turns"] == 3
    assert found["cycles"]["sampling"] > 3000
    assert found["cycles"]["rest"] > 1000
    assert min(found["bytes"].values()) > 0


@pytest.mark.parametrize("target", ["tpu-v6e:2x2", "tpu-v5p:2x2x1", "tpu-v5e:1x1", "tpu-v5e:4x4"])
def test_a_host_of_every_slice_has_a_program(target, small):
    found = slice_program.account(task(small, None, target=target))
    assert found["exchanges"] == {}
    assert found["cycles"]["turns"] == 3


def test_the_largest_batch_is_found(small):
    found = slice_program.account(task(small, "data=4", batch_size=None, most=2))
    assert found["batch_size"] == 2


def test_int8_halves_the_weights_and_restores_few_at_once():
    whole, small, multiplied = (
        slice_program.account(task("shapes64", "data=4", weights=kind))["bytes"]
        for kind in ("full", "int8", "w8a8")
    )
    for what in ("weights and inputs", "text encoders"):
        assert multiplied[what] == small[what]
    for what in ("weights and inputs", "text encoders"):
        assert small[what] < 0.65 * whole[what]  # the decoder and embeddings stay
    saved = whole["weights and inputs"] - small["weights and inputs"]
    assert small["temporaries"] < whole["temporaries"] + 0.8 * saved


def test_a_second_pass_in_windows_is_part_of_the_program(small):
    models = asdict(Models(str(small), upscale="latent:2,strength=1"))
    found = slice_program.account(replace(task(small, "data=4"), models=models))
    assert found["cycles"]["turns"] == 6
    assert found["exchanges"] == {}


def test_text_encoders_on_the_host_take_nothing_of_a_chip(small):
    found = slice_program.account(task(small, "data=4", text_encoders="host"))
    assert found["bytes"]["text encoders"] == 0


@pytest.mark.parametrize("tokens", [256, 400_000])  # of the text encoder's embeddings
def test_unloaded_text_encoders_take_what_exceeds_the_temporaries(tokens, tmp_path):
    larger = small_families.PIXART.changed("text_encoder", vocab_size=tokens)
    model = small_families.save(larger, tmp_path / "model")
    stay, leave = (
        slice_program.account(task(model, "data=4", text_encoders=place))["bytes"]
        for place in ("device", "unload")
    )
    beyond = stay["text encoders"] - stay["temporaries"] - stay["images"]
    if tokens == 256:
        assert beyond < 0
        assert leave == stay | {"text encoders": 0}
    else:  # and the temporaries of encoding
        assert 0 < beyond < leave["text encoders"] < stay["text encoders"]
        assert leave | {"text encoders": 0} == stay | {"text encoders": 0}


def test_a_batch_that_does_not_fit_says_why(small):
    large = ROW | {"width": 1024, "height": 1024}
    found = slice_program.account(task(small, "data=4", batch_size=512, row=large))
    assert "exceeds available HBM (15.75G)" in found["too_large"]
    assert found.keys() == {"batch_size", "too_large"}


@pytest.mark.parametrize("mesh", ["data=4", "data=1,model=4", "data=2,model=2"])
@pytest.mark.parametrize(
    ("heads", "width", "tokens", "context"),
    [
        (8, 40, 4096, 4096),  # Stable Diffusion's, at 512x512
        (8, 40, 4096, 77),
        (8, 160, 1024, 1024),  # wider than a register
        (1, 512, 4096, 4096),  # the autoencoder's: one head for two devices
        (24, 128, 4608, 4608),  # FLUX.1's, at 1024x1024
    ],
)
def test_attention_calls_pallas_kernel_for_the_meshs_devices(heads, width, tokens, context, mesh):
    devices = slice_program.described(slices.parse("tpu-v5e:2x2"))
    where = parallel.make_mesh(mesh, devices)
    split = NamedSharding(where, PartitionSpec("data"))

    def attend(query, key):
        return attention(query, key, key, heads)

    query, key = (
        jax.ShapeDtypeStruct((4, length, heads * width), jnp.bfloat16, sharding=split)
        for length in (tokens, context)
    )
    program = jax.jit(parallel.over_data(attend, where, (0, 0))).lower(query, key).compile()
    assert program_text.kernels(program.as_text()) == 1


def test_images_of_a_small_batch_are_not_cut_into_strips():
    devices = slice_program.described(slices.parse("tpu-v5e:1x1"))
    where = parallel.make_mesh(None, devices)
    whole = NamedSharding(where, PartitionSpec())
    block = nnx.eval_shape(
        lambda: ResnetBlock2D(128, 128, groups=32, epsilon=1e-6, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(block)
    params = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, jnp.bfloat16, sharding=whole), state
    )
    image = jax.ShapeDtypeStruct((2, 64, 64, 128), jnp.bfloat16, sharding=whole)

    def estimated(compiled) -> int:
        return program_text.cycles(compiled.as_text(), sampling="none").rest

    def run(params, image):
        return nnx.merge(graph, params)(image)

    with jax.sharding.set_mesh(where):
        by_default = jax.jit(run).lower(params, image).compile()
        ours = compilation.jit(run, where).lower(params, image).compile()
    assert estimated(ours) < 0.7 * estimated(by_default)


def test_a_dry_run_compiles_once(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    command = ["generate", f"--manifest={prompts}", f"--output={tmp_path / 'out'}", "--dry-run"]
    command += [f"--model={small}", "--steps=3", "--target=tpu-v5e:2x2"]
    command += ["--num-images=1000", "--batch-size=2", "--width=64", "--height=64"]

    def said(*more: str) -> tuple[str, str]:
        assert cli.main([*command, *more]) == 0
        return capsys.readouterr()

    first, errors = said("--price-per-chip-hour=500000")
    assert "compiling for tpu-v5e:2x2 at 64x64" in errors
    assert "  exchanges between chips: none; Pallas kernels: 0" in first.splitlines()
    assert "in each of 3 turns of the sampling loop" in first
    assert "float32 takes twice the memory of --dtype bfloat16" in first
    again, errors = said("--price-per-chip-hour=1000000", "--utilisation=0.2")
    assert errors == ""
    bills = [float(text.splitlines()[-1].split()[2]) for text in (first, again)]
    assert bills[1] == pytest.approx(4 * bills[0], rel=0.05)
    assert not (tmp_path / "out").exists()


def test_programs_compiled_ahead_have_the_same_keys_everywhere(
    tmp_path, small, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    command = ["compile", f"--manifest={prompts}", f"--model={small}", "--dtype=bfloat16"]
    command += ["--target=tpu-v5e:2x2", "--steps=3", "--width=64", "--height=64"]

    def keys(folder: str, *more: str) -> list[str]:
        assert cli.main([*command, f"--output={tmp_path / folder}", *more]) == 0
        return sorted(path.name for path in (tmp_path / folder).iterdir())

    found = keys("found")
    title, *_, usage = capsys.readouterr().out.splitlines()
    assert title.startswith("tpu-v5e:2x2, 64x64, 3 steps of ")
    assert usage.endswith(" and --batch-size 1")  # two images on four chips
    programs = {name.partition("-")[0] for name in found}
    assert programs == {"jit_encode", "jit_sample_pixels", "jit_unchanged"}
    assert keys("again", "--batch-size=1") == found
    on_host = {*keys("host", "--batch-size=1", "--text-encoders=host")}
    assert {name.partition("-")[0] for name in {*found} - on_host} == {"jit_encode"}
    assert {name.partition("-")[0] for name in on_host} == programs - {"jit_encode"}


def test_a_program_that_does_not_fit_is_not_for_a_fleet(tmp_path, small, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    command = ["compile", f"--manifest={prompts}", f"--model={small}", "--batch-size=512"]
    command += ["--target=tpu-v5e:2x2", "--dtype=bfloat16", "--width=1024", "--height=1024"]
    assert cli.main([*command, f"--output={tmp_path / 'programs'}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "batch size 512 per device does not fit: " in said
