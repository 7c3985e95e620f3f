"""What users of the transformer families may get wrong ends in one line that says what to do."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import small_families
from small_families import SMALL

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import settings as job_settings
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.families.opening import open_ensemble
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint

pytestmark = pytest.mark.usefixtures("compiled_faster")

FLUX, SCHNELL, KLEIN, SD3 = "FLUX.1 dev", "FLUX.1 schnell", "FLUX.2 klein", "Stable Diffusion 3"
WITHOUT_T5 = "Stable Diffusion 3 without T5"
EVERY = (FLUX, KLEIN, "PixArt-Sigma", "Qwen-Image", "Sana", SD3, "Z-Image")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a function that writes a family's small checkpoint, which no test may modify."""
    folder = tmp_path_factory.mktemp("small")
    return cache(lambda name: small_families.save(SMALL[name], folder / name.replace(" ", "-")))


@pytest.fixture
def copied(checkpoint, tmp_path):
    """Returns a function that copies one, to be modified."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def planned(checkpoint, tmp_path, capsys):
    """Returns a function that plans rows without making anything: exit code, output and errors."""

    def planned(name: str, *options: str, rows=({"prompt": "a red circle"},)):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        said = [f"--manifest={path}", f"--output={tmp_path / 'out'}", f"--model={checkpoint(name)}"]
        code = cli.main(["generate", *said, "--dry-run", *options])
        return code, *capsys.readouterr()

    return planned


@pytest.fixture
def refused(planned):
    """Returns a function that plans what must be refused, and returns the line that says why."""

    def refused(name: str, *options: str, **manifest) -> str:
        code, _, errors = planned(name, *options, **manifest)
        (line,) = errors.splitlines()
        assert code == 2
        return line.removeprefix("jaxdiff: ")

    return refused


def test_flux_needs_its_second_text_encoder(copied):
    directory = copied(FLUX)
    shutil.rmtree(directory / "text_encoder_2")
    with pytest.raises(InputError, match=r"text_encoder_2/model\.safetensors is missing; copy"):
        open_checkpoint(directory)
    edit(directory / "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(InputError, match=r"text_encoder_2 is \[None, None\], but only .*T5Encoder"):
        open_checkpoint(directory)


def test_stable_diffusion_3_works_without_t5(checkpoint):
    opened = open_checkpoint(checkpoint(WITHOUT_T5))
    assert opened.text_encoders == ("text_encoder", "text_encoder_2")
    assert opened.defaults.name == open_checkpoint(checkpoint(SD3)).defaults.name == SD3
    request = jaxdiff.Request(prompt="a red circle", steps=2, width=64, height=64)
    (image,) = jaxdiff.load(opened.path).generate([request])
    assert image.finite
    assert image.pixels.std() > 10


def test_another_network_in_a_text_encoders_place_is_named(checkpoint, copied):
    directory = copied(FLUX)
    shutil.rmtree(directory / "text_encoder_2")
    shutil.copytree(checkpoint("Z-Image") / "text_encoder", directory / "text_encoder_2")
    message = (
        r"^\S*/model: text_encoder_2/config.json: model_type = 'qwen3' is not supported \(only"
    )
    with pytest.raises(InputError, match=message):
        networks_of(open_checkpoint(directory))


@pytest.mark.parametrize(
    ("name", "folder", "other"),
    [
        (FLUX, "tokenizer", "Z-Image"),
        (FLUX, "tokenizer_2", "Z-Image"),
        (KLEIN, "tokenizer", "PixArt-Sigma"),
        ("Sana", "tokenizer", "Z-Image"),
        ("Z-Image", "tokenizer", "Sana"),
    ],
)
def test_another_models_tokenizer_is_refused(checkpoint, copied, name, folder, other):
    """transformers reads most kinds as each other, with other tokens."""
    directory = copied(name)
    shutil.rmtree(directory / folder)
    shutil.copytree(checkpoint(other) / "tokenizer", directory / folder)
    with pytest.raises(InputError, match=rf"{folder}/\S*: tokenizer_class = .* needs a \w+;"):
        of_checkpoint(open_checkpoint(directory))


# The network whose config is changed; what of the transformer does not fit, and what is needed.
MISFITS = [
    (FLUX, "vae", {"latent_channels": 4}, "in_channels = 64", 16),
    (FLUX, "transformer", {"out_channels": 32}, "out_channels = 32", 64),
    (FLUX, "text_encoder", {"hidden_size": 64}, "pooled_projection_dim = 32", 64),
    (FLUX, "text_encoder_2", {"d_model": 64}, "joint_attention_dim = 32", 64),
    (KLEIN, "vae", {"latent_channels": 4}, "in_channels = 128", 16),
    (KLEIN, "transformer", {"out_channels": 64}, "out_channels = 64", 128),
    (KLEIN, "text_encoder", {"hidden_size": 64}, "joint_attention_dim = 96", 192),
    (KLEIN, "transformer", {"guidance_embeds": True}, "guidance_embeds = True", False),
    (SD3, "vae", {"latent_channels": 4}, "in_channels = 16", 4),
    (SD3, "transformer", {"out_channels": 4}, "out_channels = 4", 16),
    (SD3, "text_encoder", {"projection_dim": 64}, "pooled_projection_dim = 64", 96),
    (SD3, "text_encoder_3", {"d_model": 96}, "joint_attention_dim = 64", 96),
    (WITHOUT_T5, "text_encoder_2", {"hidden_size": 64}, "joint_attention_dim = 64", 96),
    ("PixArt-Sigma", "vae", {"latent_channels": 8}, "in_channels = 4", 8),
    ("PixArt-Sigma", "text_encoder", {"d_model": 64}, "caption_channels = 32", 64),
    ("Z-Image", "vae", {"latent_channels": 4}, "in_channels = 16", 4),
    ("Z-Image", "text_encoder", {"hidden_size": 64}, "cap_feat_dim = 32", 64),
    (
        *("Qwen-Image", "transformer", {"in_channels": 16, "out_channels": 4}),
        *("in_channels = 16", 64),
    ),
    ("Qwen-Image", "transformer", {"joint_attention_dim": 64}, "joint_attention_dim = 64", 32),
    ("Sana", "vae", {"latent_channels": 4}, "in_channels = 8", 4),
    ("Sana", "transformer", {"out_channels": 4}, "out_channels = 4", 8),
    ("Sana", "text_encoder", {"hidden_size": 64}, "caption_channels = 32", 64),
]


@pytest.mark.parametrize(("name", "network", "changes", "given", "needed"), MISFITS)
def test_networks_that_do_not_fit_together_are_refused(
    copied, name, network, changes, given, needed
):
    directory = copied(name)
    edit(directory / network / "config.json", **changes)
    message = (
        f"the transformer's {given} does not fit the other networks, which need {needed}; copy"
    )
    with pytest.raises(InputError, match=message) as refusal:
        networks_of(open_checkpoint(directory))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "network", "changes"),
    [
        (FLUX, "transformer", {"num_layers": 10**6}),
        (FLUX, "transformer", {"num_single_layers": 10**6}),
        (FLUX, "text_encoder_2", {"num_layers": 10**6}),
        (SD3, "vae", {"layers_per_block": 10**6}),
        ("Z-Image", "transformer", {"n_layers": 10**6}),
        ("Z-Image", "transformer", {"n_refiner_layers": 10**6}),
        ("Z-Image", "text_encoder", {"num_hidden_layers": 10**6}),
        ("Qwen-Image", "vae", {"num_res_blocks": 10**6}),
        ("Sana", "vae", {"decoder_layers_per_block": [1, 10**6]}),
        ("Sana", "vae", {"encoder_layers_per_block": [10**6, 1]}),
        ("Sana", "vae", {"encoder_qkv_multiscales": [[], [3] * 1000]}),
    ],
)
def test_a_config_of_a_million_layers_ends_at_once(copied, name, network, changes):
    directory = copied(name)
    edit(directory / network / "config.json", **changes)
    ((key, _),) = changes.items()
    message = f"{network}/config.json: {key} = .* describes more modules than the [0-9]+ weights"
    with pytest.raises(InputError, match=message) as refusal:
        networks_of(open_checkpoint(directory))
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("name", EVERY)
def test_an_unknown_key_of_a_transformers_config_is_named(copied, name):
    directory = copied(name)
    edit(directory / "transformer" / "config.json", unheard_of=3)
    message = "/model: transformer/config.json: the key unheard_of = 3 is not supported$"
    with pytest.raises(InputError, match=message):
        networks_of(open_checkpoint(directory))


@pytest.mark.parametrize("name", [FLUX, KLEIN, "PixArt-Sigma", "Qwen-Image", SD3, "Z-Image"])
def test_sides_are_whole_patches(refused, name):
    """Of 2 latents of 8 pixels each in all published models."""
    assert refused(name, "--width=72", "--height=64") == (
        "--width must be a multiple of 16 for this model, not 72; the nearest is 64"
    )


def test_sides_of_sanas_images_are_whole_latents(refused, planned):
    assert "multiple of 2 for this model, not 73" in refused("Sana", "--width=73", "--height=64")
    assert planned("Sana", "--width=72", "--height=64")[0] == 0


@pytest.mark.parametrize("name", [FLUX, KLEIN, "Qwen-Image", "Sana", SD3, "Z-Image"])
def test_a_sampler_that_does_not_fit_flow_names_those_that_do(refused, name):
    line = refused(name, "--sampler=ddim")
    assert line.endswith(
        "ddim does not support models trained by flow matching; choose the sampler euler, heun, "
        "dpmpp_2m, unipc"
    )


def test_pixart_is_not_trained_by_flow_matching(planned):
    assert planned("PixArt-Sigma", "--sampler=ddim")[0] == 0


@pytest.mark.parametrize("name", [SCHNELL, KLEIN])
def test_a_guidance_scale_for_a_distilled_model_is_refused(refused, planned, name):
    assert refused(name, "--guidance-scale=3") == (
        f"--guidance-scale has no effect on {name}, which was distilled to need none; leave it out"
    )
    assert planned(name, "--guidance-scale=1")[0] == 0


def notices(output: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in output.splitlines())
    return {kind: text for kind, _, text in lines if kind.endswith(("effect", "prompts"))}


UNHEEDED = [{"prompt": "a", "guidance_scale": 3}, {"prompt": "b", "negative_prompt": "x"}]


def test_rows_that_ask_a_distilled_model_for_guidance_are_noticed(planned):
    code, output, _ = planned(SCHNELL, rows=UNHEEDED)
    found = notices(output)
    assert code == 0
    assert found.keys() == {"guidance scales without effect", "negative prompts without effect"}
    assert "line 1 of" in found["guidance scales without effect"]
    assert "distilled to need none" in found["guidance scales without effect"]
    assert "line 2 of" in found["negative prompts without effect"]
    assert found["negative prompts without effect"].endswith("; the model takes none")


def test_flux_dev_takes_guidance_scales_but_no_negative_prompts(planned):
    _, output, _ = planned(FLUX, rows=UNHEEDED)
    assert notices(output).keys() == {"negative prompts without effect"}


def test_the_notices_of_guided_models_are_for_rows_without_guidance_only(planned):
    _, output, _ = planned(SD3, rows=UNHEEDED)
    assert notices(output) == {}


@pytest.mark.parametrize("option", ["--deep-cache=2", "--prompt-chunks=2", "--clip-skip=1"])
@pytest.mark.parametrize("name", [FLUX, KLEIN, "PixArt-Sigma", "Qwen-Image", "Sana", "Z-Image"])
def test_options_of_other_families_are_refused(refused, name, option):
    said = option.partition("=")[0]
    assert refused(name, option) == f"{said} has no effect on {name}; leave it out"


def test_stable_diffusion_3_skips_layers_of_clip_but_has_no_other_option(refused, planned):
    assert planned(SD3, "--clip-skip=1")[0] == 0
    for option in ("--deep-cache", "--prompt-chunks"):
        assert refused(SD3, f"{option}=2") == f"{option} has no effect on {SD3}; leave it out"


def test_qwen_image_takes_at_least_two_steps(refused, planned):
    """Its schedule ends at a fixed level, so with one step there would be none to begin at."""
    assert "steps must be at least 2" in refused("Qwen-Image", "--steps=1")
    code, output, _ = planned("Qwen-Image", rows=[{"prompt": "a", "steps": 1}, {"prompt": "b"}])
    assert code == 0
    assert "rows: 1 used, 1 rejected" in output
    assert "line 1: steps must be at least 2" in output


@pytest.mark.parametrize("name", EVERY)
def test_prompts_that_are_too_long_are_noticed(planned, name):
    """But not those that the family's tokenizer, with all that it adds, leaves whole."""
    rows = [{"prompt": "a red circle"}, {"prompt": "a red circle " * 300}]
    _, output, _ = planned(name, rows=rows)
    found = notices(output)
    assert found.keys() == {"cut prompts"}
    assert found["cut prompts"].startswith("1 row on line 2 of ")
    assert "encodes longer prompts" not in found["cut prompts"]  # as if the option were there


def test_published_pixart_checkpoints_have_an_older_class(copied):
    """Their config also has keys of other networks, which this class had besides."""
    folder = copied("PixArt-Sigma")
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    older = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.28.0.dev0",
        "attention_type": "default",
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    edit(folder / "transformer" / "config.json", **older)
    assert networks_of(open_checkpoint(folder)).denoiser.component == "transformer"


@pytest.mark.parametrize(
    ("family", "changes"),
    [(SD3, {"pos_embed_max_size": 6}), ("Z-Image", {"axes_lens": [1024, 6, 8]})],
)
def test_images_larger_than_the_positions_are_refused_before_they_are_made(copied, family, changes):
    folder = copied(family)
    edit(folder / "transformer" / "config.json", **changes)
    with pytest.raises(InputError, match="--width must be a whole number from 16 to 96, not 112"):
        job_settings.resolve({"width": 112, "height": 16}, open_ensemble(folder))


def test_a_text_encoder_with_too_few_layers_is_refused(copied):
    folder = copied(KLEIN)
    edit(folder / "text_encoder" / "config.json", num_hidden_layers=26)
    with pytest.raises(InputError, match="num_hidden_layers = 26 must be at least 27"):
        networks_of(open_checkpoint(folder))
