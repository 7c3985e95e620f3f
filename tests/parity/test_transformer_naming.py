"""Single files of transformer models: the weights are those of diffusers' converters."""

import dataclasses
import io
import json
import shutil
import tarfile
import types
from pathlib import Path

import numpy as np
import original_transformers as names
import PIL.Image
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("compiled_faster")

import transformer_families  # noqa: E402
from cases import further  # noqa: E402
from diffusers.loaders import single_file_utils as theirs  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import jaxdiff  # noqa: E402
from jaxdiff import cli  # noqa: E402
from jaxdiff.checkpoint import single_file, transformer_files  # noqa: E402
from jaxdiff.checkpoint.safetensors_header import read_header  # noqa: E402
from jaxdiff.checkpoint.tensors import StoredTensor  # noqa: E402
from jaxdiff.errors import InputError  # noqa: E402
from jaxdiff.families import inspect, open_checkpoint  # noqa: E402
from jaxdiff.models.flux import FluxConfig  # noqa: E402
from jaxdiff.models.flux2 import Flux2Config  # noqa: E402
from jaxdiff.models.sd3 import SD3Config  # noqa: E402
from jaxdiff.models.z_image import ZImageConfig  # noqa: E402

WIDTH = 256
PATH = Path("a.safetensors")


def convert_flux(state):
    """diffusers' function, which expects a width of 3072, for ours."""
    function = theirs.convert_flux_transformer_checkpoint_to_diffusers
    constants = tuple(WIDTH if each == 3072 else each for each in function.__code__.co_consts)
    assert constants != function.__code__.co_consts
    code = function.__code__.replace(co_consts=constants)
    return types.FunctionType(code, function.__globals__)(state)


CLASSES = {
    "flux": (diffusers.FluxTransformer2DModel, FluxConfig, names.FLUX, convert_flux),
    "sd3": (
        diffusers.SD3Transformer2DModel,
        SD3Config,
        names.SD3,
        theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "flux2": (
        diffusers.Flux2Transformer2DModel,
        Flux2Config,
        names.FLUX_2,
        theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "z_image": (
        diffusers.ZImageTransformer2DModel,
        ZImageConfig,
        names.Z_IMAGE,
        theirs.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}
FLUX = {"guidance_embeds": True}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD3 |= {"pos_embed_max_size": 192}
SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
SD35_LARGE |= {"qk_norm": "rms_norm", "pos_embed_max_size": 192}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
KLEIN |= {"joint_attention_dim": 7680, "guidance_embeds": False}
Z_IMAGE = {"axes_lens": [1536, 512, 512]}
PUBLISHED = {
    "FLUX.1 dev": ("flux", FLUX),
    "FLUX.1 schnell": ("flux", {}),
    "Stable Diffusion 3": ("sd3", SD3),
    "Stable Diffusion 3.5 medium": ("sd3", SD3 | SD35),
    "Stable Diffusion 3.5 large": ("sd3", SD35_LARGE),
    "FLUX.2 dev": ("flux2", {}),
    "FLUX.2 klein": ("flux2", KLEIN),
    "Z-Image": ("z_image", Z_IMAGE),
}
SMALL_FLUX = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}
SMALL_FLUX |= {"joint_attention_dim": 24}
SMALL_SD3 = {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128}
SMALL_SD3 |= {"joint_attention_dim": 24, "pooled_projection_dim": 40, "pos_embed_max_size": 6}
SMALL = {
    "flux": SMALL_FLUX | {"pooled_projection_dim": 40},
    "sd3": SMALL_SD3,
    "flux2": SMALL_FLUX | {"timestep_guidance_channels": 32},
    "z_image": {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 24},
}
KINDS = {
    "FLUX.1 dev": ("flux", FLUX),
    "FLUX.1 schnell": ("flux", {}),
    "Stable Diffusion 3": ("sd3", {}),
    "Stable Diffusion 3.5 medium": ("sd3", SD35 | {"dual_attention_layers": (0, 1)}),
    "FLUX.2 dev": ("flux2", {}),
    "FLUX.2 klein": ("flux2", {"guidance_embeds": False}),
    "Z-Image": ("z_image", Z_IMAGE),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_at_full_size_the_config_and_all_shapes_are_found(name, prefix):
    kind, config = PUBLISHED[name]
    network_class, config_class, table, _ = CLASSES[kind]
    with torch.device("meta"):
        network = network_class(**config)
    state = network.state_dict()
    stored = {
        prefix + key: StoredTensor(PATH, prefix + key, "BF16", tuple(tensor.shape), 0)
        for key, tensor in names.original(table, state, torch.cat).items()
    }
    contents = transformer_files.contents(PATH, stored)
    assert name.startswith(contents.name)
    found = contents.configs["transformer"]
    as_saved = {k: list(v) if isinstance(v, tuple) else v for k, v in network.config.items()}
    assert config_class.from_json(found) == config_class.from_json(as_saved)
    weights = single_file.weights(PATH, stored, contents)
    assert list(weights) == ["transformer"]
    assert {key: each.shape for key, each in weights["transformer"].items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items()
    }


@pytest.mark.parametrize("name", KINDS)
def test_every_value_ends_up_where_diffusers_puts_it(name, tmp_path):
    kind, config = KINDS[name]
    network_class, _, table, convert = CLASSES[kind]
    network = network_class(**{**config, **SMALL[kind]})
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(tensor.shape, generator=generator)
        for key, tensor in network.state_dict().items()
    }
    tensors = names.original(table, state, torch.cat)
    save_file(tensors, tmp_path / PATH)
    expected = convert(dict(tensors))
    assert expected.keys() == state.keys()
    stored = read_header(tmp_path / PATH)
    contents = transformer_files.contents(tmp_path / PATH, stored)
    ours = single_file.weights(tmp_path / PATH, stored, contents)["transformer"]
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), expected[key], err_msg=key)
        np.testing.assert_array_equal(tensor.read(), state[key], err_msg=key)


def small_flux(directory: Path, base: Path) -> Path:
    """Writes `base` with another transformer, of the width that single files have."""
    shutil.copytree(base, directory)
    torch.manual_seed(1)
    config = FLUX | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1}
    config |= {"joint_attention_dim": 32, "pooled_projection_dim": 32}
    network = transformer_families._randomised(diffusers.FluxTransformer2DModel(**config))
    shutil.rmtree(directory / "transformer")
    network.save_pretrained(directory / "transformer")
    return directory


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """Returns a base, a single file of another transformer, and a directory of both."""
    folder = tmp_path_factory.mktemp("flux")
    base = transformer_families.save("FLUX.1 dev", folder / "base")
    whole = small_flux(folder / "whole", base)
    state = load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(names.original(names.FLUX, state, torch.cat), folder / "flux.safetensors")
    shutil.rmtree(base / "transformer")  # is not needed
    return base, folder / "flux.safetensors", whole


PROMPTS = ["a red circle", "two blue stars"]


def pixels(model, **request):
    requests = [
        jaxdiff.Request(prompt=prompt, seed=seed, width=48, height=32, steps=2, **request)
        for seed, prompt in enumerate(PROMPTS)
    ]
    return np.stack([image.pixels for image in model.generate(requests)])


@pytest.fixture(scope="module")
def expected(flux):
    """Returns the images of the directory."""
    _, _, whole = flux
    made = pixels(jaxdiff.load(whole))
    assert made.std() > 1
    return made


def test_a_transformer_and_a_base_make_the_directorys_images(flux, expected):
    base, file, whole = flux
    ours = jaxdiff.load(file, base=base)
    theirs = open_checkpoint(whole)
    assert ours.checkpoint.config("scheduler") == theirs.config("scheduler")
    assert ours.checkpoint.networks == theirs.networks
    np.testing.assert_array_equal(pixels(ours), expected)


def test_what_makes_the_images_is_in_the_fingerprint(flux, tmp_path):
    base, file, _ = flux
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    first = open_checkpoint(file, base=base).fingerprint
    assert open_checkpoint(file, base=copy).fingerprint == first
    for name in (
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "tokenizer_2/tokenizer.json",
    ):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b"\n")
        assert open_checkpoint(file, base=copy).fingerprint != first, name
        (copy / name).write_bytes(content)
    shutil.copytree(flux[2] / "transformer", copy / "transformer")
    assert open_checkpoint(file, base=copy).fingerprint == first


def test_a_job_with_a_base_is_continued_and_inspected(
    flux, expected, tmp_path, monkeypatch, capsys
):
    base, file, _ = flux
    rows = [json.dumps({"prompt": prompt, "seed": seed}) for seed, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(base.parent)
    command = ["generate", f"--manifest={tmp_path / 'rows.jsonl'}", f"--output={tmp_path / 'out'}"]
    command += ["--width=48", "--height=32", "--steps=2", "--model=flux.safetensors", "--base=base"]
    assert cli.main(command) == 0
    plan = json.loads((tmp_path / "out" / "_jaxdiff" / "plan" / "plan.json").read_text())
    assert plan["models"]["base"] == str(base)
    np.testing.assert_array_equal(images(tmp_path / "out"), expected)
    # As if it had been stopped before its only shard was done.
    (tmp_path / "out" / "_SUCCESS").unlink()
    for marker in (tmp_path / "out" / "_jaxdiff" / "done").iterdir():
        marker.unlink()
    assert cli.main(command) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(images(tmp_path / "out"), expected)
    capsys.readouterr()
    assert cli.main(["inspect", str(file), "--base", str(base)]) == 0
    said = capsys.readouterr().out
    assert "FLUX.1 dev" in said
    assert said.rstrip().endswith(" yes")


def images(directory: Path) -> np.ndarray:
    """Returns the images of a dataset's only shard."""
    (shard,) = directory.rglob("*.tar")
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(each).read() for each in tar if each.name.endswith(".png")]
    return np.stack([np.asarray(PIL.Image.open(io.BytesIO(file))) for file in files])


# Sizes that whole files tell by their shapes: heads of 64 and 128, groups of 32.
CLIP = {"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64}
VAE = {"block_out_channels": (32, 32, 64), "norm_num_groups": 32}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 3}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 3}
WHOLE = {"CLIP": CLIP, "VAE_16": VAE}
WHOLE["FLUX"] = {"attention_head_dim": 128, "num_attention_heads": 1}
WHOLE["FLUX"] |= {"axes_dims_rope": (16, 56, 56), "pooled_projection_dim": 64}
WHOLE["SD3"] = {"attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64}
WHOLE["SD3"] |= {"sample_size": 128, "joint_attention_dim": 128, "pooled_projection_dim": 128}


def small_pipeline(name):
    with pytest.MonkeyPatch.context() as patch:
        for table, changes in WHOLE.items():
            patch.setattr(
                transformer_families, table, getattr(transformer_families, table) | changes
            )
        torch.manual_seed(2)
        return transformer_families.FAMILIES[name]()


def save_whole(path, pipeline, table, vae, encoders):
    """Writes a pipeline as one file, with its encoders by their original names."""
    state = names.original(table, pipeline.transformer.state_dict(), torch.cat)
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
    tensors |= names.autoencoder(pipeline.vae.state_dict(), vae, 3)
    for name, encoder in encoders.items():
        for key, tensor in getattr(pipeline, encoder).state_dict().items():
            if name == "clip_l":  # which transformers names without this since 5.6
                key = f"text_model.{key.removeprefix('text_model.')}"
            tensors[f"text_encoders.{name}.transformer.{key}"] = tensor
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    # Not used: Flux takes no projected text, Stable Diffusion 3 not CLIP-L's.
    tensors.pop("text_encoders.clip_l.transformer.text_model.text_projection.weight", None)
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = torch.randn(64, 64)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """Returns a whole single file of Stable Diffusion 3.5, and the same directory."""
    folder = tmp_path_factory.mktemp("sd3")
    pipeline = small_pipeline("Stable Diffusion 3.5")
    t5 = transformers.T5Config(**transformer_families.T5 | {"d_model": 128})
    t5 = transformer_families._randomised(transformers.T5EncoderModel(t5))
    pipeline.register_modules(text_encoder_3=t5)
    pipeline.text_encoder.text_projection.weight.data.copy_(torch.eye(64))
    pipeline.save_pretrained(folder / "whole")
    encoders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    save_whole(folder / "sd3.safetensors", pipeline, names.SD3, "first_stage_model.", encoders)
    return folder / "sd3.safetensors", folder / "whole"


def same_weights(ours, theirs):
    assert ours.networks == theirs.networks
    for network in ours.networks:
        found, expected = ours.weights(network), theirs.weights(network)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            np.testing.assert_array_equal(tensor.read(), expected[key].read(), err_msg=key)


@pytest.mark.parametrize("name", ["FLUX.1 dev", further("FLUX.1 schnell")])
def test_a_whole_flux_file_needs_no_base(name, tmp_path):
    pipeline = small_pipeline(name)
    pipeline.save_pretrained(tmp_path / "whole")
    encoders = {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}
    save_whole(tmp_path / "a.safetensors", pipeline, names.FLUX, "vae.", encoders)
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tmp_path / "whole" / folder, tmp_path / folder)
    ours, theirs = open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "whole")
    same_weights(ours, theirs)
    assert inspect.report(ours).splitlines()[-1].split() == ["usable", "yes"]
    assert ours.config("scheduler").items() <= theirs.config("scheduler").items()
    assert ours.defaults.latents == theirs.defaults.latents
    assert ours.defaults.name == theirs.defaults.name == name


def test_a_whole_file_makes_the_directorys_images(sd3):
    file, whole = sd3
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError, match="contains no tokenizer"):
            open_checkpoint(file)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(whole / name, file.parent / name)
    ours, theirs = jaxdiff.load(file), jaxdiff.load(whole)
    expected = pixels(theirs, guidance_scale=2.0)
    assert expected.std() > 1
    np.testing.assert_array_equal(pixels(ours, guidance_scale=2.0), expected)
    with pytest.raises(InputError, match=r"lacks no part of Stable Diffusion 3; leave out --base"):
        open_checkpoint(file, base=whole)


def test_without_text_encoders_they_are_the_bases(sd3, tmp_path):
    file, whole = sd3
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("text_encoders.")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"without text_encoder, text_encoder_2; take them from"):
        open_checkpoint(tmp_path / "a.safetensors")
    same_weights(open_checkpoint(tmp_path / "a.safetensors", base=whole), open_checkpoint(whole))
    tensors = {k: v for k, v in load_file(file).items() if "t5xxl" not in k}
    save_file(tensors, file.with_name("b.safetensors"))
    assert "text_encoder_3" in open_checkpoint(file.with_name("b.safetensors"), base=whole).networks
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(whole / name, file.parent / name, dirs_exist_ok=True)
    assert "text_encoder_3" not in open_checkpoint(file.with_name("b.safetensors")).networks


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("Z-Image", "z_image", {"in_channels": 16, "cap_feat_dim": 32}),
        ("FLUX.2 klein", "flux2", {"joint_attention_dim": 96, "guidance_embeds": False}),
    ],
)
def test_later_models_are_usable_with_a_base(name, kind, config, tmp_path):
    base = transformer_families.save(name, tmp_path / "base")
    network_class, _, table, _ = CLASSES[kind]
    network = transformer_families._randomised(network_class(**{**SMALL[kind], **config}))
    file, unused = tmp_path / "a.safetensors", {"norm_final.weight": torch.ones(256)}
    save_file(names.original(table, network.state_dict(), torch.cat) | unused, file)
    with pytest.raises(InputError, match=rf"is {name} without text_encoder, vae; take them from"):
        open_checkpoint(file)
    opened = open_checkpoint(file, base=base)
    assert opened.networks == ("text_encoder", "transformer", "vae")
    assert inspect.report(opened).splitlines()[-1].split() == ["usable", "yes"]
    small = open_checkpoint(base).defaults.largest_side  # no weight tells how many positions fit
    assert (
        dataclasses.replace(opened.defaults, largest_side=small) == open_checkpoint(base).defaults
    )


def test_a_family_that_is_not_supported_is_named(tmp_path):
    network = diffusers.Flux2Transformer2DModel(**SMALL["flux2"], guidance_embeds=True)
    file = tmp_path / "a.safetensors"
    save_file(names.original(names.FLUX_2, network.state_dict(), torch.cat), file)
    with pytest.raises(InputError, match="'Flux2Pipeline' is not supported; use a checkpoint of"):
        open_checkpoint(file)
