"""Training tiny networks with complete recipes, and the files that a run writes."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jaxdiff
from jaxdiff import cli
from jaxdiff.errors import InputError
from jaxdiff.training import recipe
from jaxdiff.training.train import train

pytestmark = pytest.mark.usefixtures("compiled_faster")

TOKENIZER = Path(jaxdiff.__file__).parent / "assets" / "shapes64" / "tokenizer"
DOWN, UP = (str([name] * 3) for name in ("DownEncoderBlock2D", "UpDecoderBlock2D"))
AUTOENCODER = f"""
objective = "autoencoder"
steps = 6
batch_size = 2

[optimizer]
learning_rate = 1e-3

[checkpoints]
every = 2

[vae]
down_block_types = {DOWN}
up_block_types = {UP}
block_out_channels = [4, 4, 8]
mid_block_add_attention = false
norm_num_groups = 4
sample_size = 64
"""
TEXT_TO_IMAGE = f"""
objective = "text_to_image"
vae = "{{autoencoder}}"
tokenizer = "{TOKENIZER}"
steps = 20
batch_size = 4

[optimizer]
learning_rate = 1e-3

[data]
scenes = 64

[checkpoints]
every = 20

[text_encoder]
vocab_size = 641
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 24
bos_token_id = 639
eos_token_id = 640
pad_token_id = 640

[unet]
sample_size = 16
in_channels = 4
down_block_types = ["DownBlock2D"]
up_block_types = ["UpBlock2D"]
block_out_channels = [32]
layers_per_block = 1
norm_num_groups = 8
cross_attention_dim = 32
attention_head_dim = 2

[scheduler]
_class_name = "DDIMScheduler"
beta_schedule = "scaled_linear"
beta_start = 0.00085
beta_end = 0.012
prediction_type = "v_prediction"
rescale_betas_zero_snr = true
timestep_spacing = "trailing"
clip_sample = false
steps_offset = 1
"""
CAPTIONS = """
objective = "text_encoder"
tokenizer = "{tokenizer}"
text_encoder = {text_encoder}
steps = 2
batch_size = 2

[optimizer]
learning_rate = {rate}
"""
SMALL_TEXT_ENCODER = (
    "{vocab_size = 641, hidden_size = 16, intermediate_size = 16, num_hidden_layers = 1, "
    "num_attention_heads = 2, max_position_embeddings = 24, "
    "bos_token_id = 639, eos_token_id = 640, pad_token_id = 640}"
)


@pytest.fixture(scope="module")
def autoencoder_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    (folder / "recipe.toml").write_text(AUTOENCODER)
    train(folder / "recipe.toml", folder / "run")
    return folder / "run"


def weights(run: Path) -> bytes:
    return (run / "model" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_finished_run_is_not_trained_further(autoencoder_run):
    before = weights(autoencoder_run)
    train(autoencoder_run / "recipe.toml", autoencoder_run)
    assert weights(autoencoder_run) == before


def test_another_recipe_is_rejected_in_the_same_directory(autoencoder_run, tmp_path):
    (tmp_path / "recipe.toml").write_text(AUTOENCODER.replace("1e-3", "2e-3"))
    with pytest.raises(InputError, match="contains a run of another recipe"):
        train(tmp_path / "recipe.toml", autoencoder_run)


def test_a_trained_denoiser_becomes_a_model_that_generates(autoencoder_run, tmp_path, capsys):
    text = TEXT_TO_IMAGE.format(autoencoder=autoencoder_run / "model")
    prompts = 'prompts = ["a red circle", "a star above a ring"]'
    text = text.replace("[checkpoints]", f"[checkpoints]\n{prompts}")
    (tmp_path / "recipe.toml").write_text(text)
    assert cli.main(["train", f"{tmp_path}/recipe.toml", f"--output={tmp_path}/run"]) == 0
    model, loss, use = capsys.readouterr().out.splitlines()
    assert model == f"model: {tmp_path}/run/model, after 20 steps"
    assert re.fullmatch(r"validation loss: [\d.]+", loss)
    assert use == (
        f"to use it: jaxdiff generate --model {tmp_path}/run/model --prompt TEXT --output out/first"
    )
    *_, line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 20
    assert 0 < json.loads(line)["loss"] < 1.2  # the variance of v is 1
    assert Image.open(tmp_path / "run" / "loss.png").size[0] > 100
    assert Image.open(tmp_path / "run" / "samples" / "000020.png").size == (352, 221)
    model = jaxdiff.load(tmp_path / "run" / "model")
    (image,) = model.generate([jaxdiff.Request(prompt="a red circle", steps=2)])
    assert image.finite
    assert image.pixels.shape == (64, 64, 3)


def test_the_autoencoders_latents_are_scaled_to_unit_variance(autoencoder_run):
    from flax import nnx

    from jaxdiff.engine.program import to_float
    from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION
    from jaxdiff.training.autoencoder import render_batch
    from jaxdiff.training.components import component

    config, graph, params = component(
        STABLE_DIFFUSION, "vae", str(autoencoder_run / "model"), nnx.Rngs(0)
    )
    mean, _ = nnx.merge(graph, params).encode(to_float(render_batch(1, 1, 64)))
    assert float(config.scale(mean).std()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('objective = "autoencoder"', 'objective = "gan"', "objective"),
        ("steps = 6", "", "steps is missing"),
        ("steps = 6", "steps = 0", "steps must be at least 1"),
        ("steps = 6", 'steps = "6"', "steps must be a whole number"),
        (
            "every = 2",
            'every = 2\nprompts = ["a"]',
            "prompts has no effect on objective",
        ),
        ("steps = 6", "steps = 6\nwarmth = 1", "warmth: unknown key"),
        ("learning_rate = 1e-3", "", "optimizer.learning_rate is missing"),
        ("steps = 6", "steps = ", "not a readable TOML"),
        ('objective = "autoencoder"', 'objective = ["autoencoder"]', "objective = "),
        ("learning_rate = 1e-3", "learning_rat = 1e-3", "did you mean learning_rate"),
        ("learning_rate = 1e-3", "learning_rate = nan", "learning_rate must be at least"),
        ("learning_rate = 1e-3", "learning_rate = inf", "learning_rate must be at least"),
        ("learning_rate = 1e-3", "learning_rate = 1e-3\nclip_norm = -1.0", "clip_norm must be"),
        ("learning_rate = 1e-3", "learning_rate = 1e-3\nbeta2 = 1", "beta2 must be from 0 to"),
        ("steps = 6", "steps = 6\ncrop = 65", "crop must be from 1 to 64, not 65"),
        ("steps = 6", "steps = 6\nkl_weight = -1e-4", "kl_weight must be at least 0"),
        ("every = 2", "every = 2\nkeep_best = -1", "checkpoints.keep_best must be at least 0"),
        (
            "learning_rate = 1e-3",
            'learning_rate = 1e-3\nschedule = "constant"\nwarmup_steps = 4\ncooldown_steps = 3',
            "add up to 7, more than steps = 6",
        ),
    ],
)
def test_bad_recipes_give_one_line_errors(old, new, message, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(AUTOENCODER.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        recipe.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_number_of_a_recipe_has_a_range():
    """Except for pairs, whose order is checked, and for values that components check themselves."""
    numbers = set()
    for kind in recipe.OBJECTIVES.values():
        numbers |= set(_numbers(kind))
    assert numbers == recipe.RANGES.keys()


def _numbers(kind, before: str = ""):
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        nested = [one for one in typing.get_args(hint) or [hint] if dataclasses.is_dataclass(one)]
        if hint in (int, float):
            yield before + field.name
        for one in nested:
            yield from _numbers(one, f"{before}{field.name}.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("in_channels = 4", "in_channels = 8", "in_channels = 8 does not fit .* need 4"),
        (
            "hidden_size = 32",
            "hidden_size = 64",
            "cross_attention_dim = 32 does not fit .* need 64",
        ),
        (str(TOKENIZER), "/nowhere", "/nowhere contains no tokenizer"),
        ("{autoencoder}", "/nowhere", "/nowhere/config.json is missing"),
        ("rescale_betas", "rescale_beta", "zero_snr: unknown key; did you mean rescale_betas"),
        ("block_out_channels", "block_out_channel", "did you mean block_out_channels"),
    ],
)
def test_parts_that_do_not_fit_are_rejected(old, new, message, autoencoder_run, tmp_path):
    text = TEXT_TO_IMAGE.replace(old, new).format(autoencoder=autoencoder_run / "model")
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        train(tmp_path / "recipe.toml", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match="recipe file not found"):
        recipe.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "path",
    sorted(Path(__file__).parents[2].glob("configs/train/*.toml")),
    ids=lambda path: path.stem,
)
def test_the_committed_recipes_are_valid(path):
    recipe.read(path)


def test_batches_are_a_function_of_the_step():
    from jaxdiff.training.autoencoder import render_batch

    np.testing.assert_array_equal(render_batch(0, 3, 4), render_batch(0, 3, 4))
    assert (render_batch(0, 3, 4) != render_batch(0, 4, 4)).any()


def test_a_text_encoder_can_start_from_an_earlier_one(tmp_path):
    def trained(name: str, text_encoder: str, rate: float) -> dict[str, np.ndarray]:
        text = CAPTIONS.format(tokenizer=TOKENIZER, text_encoder=text_encoder, rate=rate)
        (tmp_path / f"{name}.toml").write_text(text)
        train(tmp_path / f"{name}.toml", tmp_path / name)
        return load_file(tmp_path / name / "model" / "model.safetensors")

    first = trained("first", SMALL_TEXT_ENCODER, 1e-2)
    further = trained("further", f'"{tmp_path}/first/model"', 1e-9)
    assert first.keys() == further.keys()
    assert all(np.allclose(first[name], further[name], atol=1e-6) for name in first)
