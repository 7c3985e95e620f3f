import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from original import REFINER, SD1, XL, shapes
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import InputError
from jaxdiff.families import inspect, open_checkpoint

TOKENIZER = Path(inspect.__file__).parents[1] / "assets" / "shapes64" / "tokenizer"


def report(model) -> dict[str, str]:
    """Returns the report's values by the name in the first column."""
    lines = inspect.report(open_checkpoint(model)).splitlines()
    assert all(line == line.rstrip() and line.isprintable() for line in lines)
    return {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may modify."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def single(tmp_path):
    """A function that writes a single file of a family, with tokenizers next to it."""

    def single(width):
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(TOKENIZER, tmp_path / name)
        tensors = {key: np.zeros(shape, np.float16) for key, shape in shapes(width).items()}
        save_file(tensors, tmp_path / "fine-tuned.safetensors")
        return tmp_path / "fine-tuned.safetensors"

    return single


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_report_of_the_bundled_model():
    lines = inspect.report(open_checkpoint("shapes64")).splitlines()
    assert lines[0] == "shapes64: Stable Diffusion 1 (StableDiffusionPipeline)"
    columns = [line.split() for line in lines[3:8]]
    assert columns[0] == ["component", "class", "parameters", "stored", "as", "size", "file"]
    assert columns[2] == [
        *("unet", "UNet2DConditionModel", "5.3M", "float16", "10.6", "MB"),
        "diffusion_pytorch_model.safetensors",
    ]
    assert columns[4] == ["total", "6.6M", "float16", "13.3", "MB"]
    values = report("shapes64")
    assert values["prediction"] == "v_prediction, zero terminal SNR"
    assert (
        values["scheduler"] == "EulerAncestralDiscreteScheduler, 1000 timesteps, trailing spacing"
    )
    assert values["default sampler"] == "euler_ancestral"
    assert (values["default steps"], values["default guidance"]) == ("20", "1.5")
    assert values["default size"] == "64 x 64 px, or other multiples of 4 px"
    assert values["tokenizer"] == "24 tokens, vocabulary of 641"
    assert values["fingerprint"] == open_checkpoint("shapes64").fingerprint


def test_the_counts_match_the_files(checkpoint):
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    count = sum(tensor.size for tensor in tensors.values())
    line = report(checkpoint)["vae"].split()
    assert line[1] == f"{count / 1000:.1f}k"
    assert line[2] == "float32"
    assert line[3:5] == [f"{4 * count / 1000:.1f}", "kB"]


def test_every_dtype_and_file_of_a_network_is_counted(checkpoint):
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    keys = sorted(tensors)
    tensors[keys[0]] = tensors[keys[0]].astype(np.float16)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = keys[:9], keys[9:]
    for name, half in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in half}, file.with_name(name))
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    Path(f"{file}.index.json").write_text(json.dumps({"weight_map": index}))
    file.unlink()
    line = report(checkpoint)["vae"]
    assert "float16, float32" in line
    assert line.endswith("2 files")


def test_a_refiners_only_text_encoder_is_the_second(single):
    values = report(single(REFINER))
    assert "CLIPTextModelWithProjection" in values["text_encoder_2"]
    assert "tokenizer_2" in values
    assert not values.keys() & {"text_encoder", "tokenizer"}


def test_a_single_file_is_reported_like_a_directory(single):
    values = report(single(XL))
    assert "fine-tuned: Stable Diffusion XL (StableDiffusionXLPipeline)" in values
    assert values["unet"].endswith("fine-tuned.safetensors")
    assert values["prediction"] == "epsilon"
    assert values["scheduler"] == "EulerDiscreteScheduler, 1000 timesteps, leading spacing"
    assert values["default size"] == "1024 x 1024 px, or other multiples of 8 px"
    assert (values["default sampler"], values["default guidance"]) == ("euler", "5")


def test_a_fine_tune_is_reported_with_its_family(single):
    values = report(single(SD1))
    assert "fine-tuned: Stable Diffusion 1 (StableDiffusionPipeline)" in values
    assert values["default sampler"] == "pndm"
    assert values["default size"].startswith("512 x 512 px")


def test_a_missing_default_is_reported_in_its_line(checkpoint):
    edit(checkpoint / "unet" / "config.json", sample_size=None)
    edit(checkpoint / "scheduler" / "scheduler_config.json", _class_name="VQ\nScheduler")
    values = report(checkpoint)
    assert "--width" in values["default size"]
    assert "--sampler" in values["default sampler"]


@pytest.mark.parametrize(
    ("changes", "line", "text"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "prediction", "flow"),
        ({"prediction_type": "epsilon"}, "prediction", "epsilon, zero terminal SNR"),
        ({"use_karras_sigmas": True}, "scheduler", "Karras sigmas"),
    ],
)
def test_the_scheduler_is_described_in_words(checkpoint, changes, line, text):
    edit(checkpoint / "scheduler" / "scheduler_config.json", **changes)
    assert report(checkpoint)[line].endswith(text)


@pytest.mark.parametrize(
    ("network", "changes", "reason"),
    [
        # The value in SSD-1B.
        ("unet", {"transformer_layers_per_block": [1, [2, 2]]}, "transformer_layers_per_block"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("vae", {"norm_num_groups": 0}, "norm_num_groups = 0"),
        ("text_encoder", {"num_hidden_layers": 3}, "16 missing (encoder.layers.2."),
        ("unet", {"layers_per_block": 2}, "does not match its config"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim = 64 does not fit"),
    ],
)
def test_the_report_tells_why_a_model_is_not_usable(checkpoint, network, changes, reason):
    assert report(checkpoint)["usable"] == "yes"
    edit(checkpoint / network / "config.json", **changes)
    usable = report(checkpoint)["usable"]
    assert usable.startswith(f"no: {checkpoint}")
    assert reason in usable


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("unet", {"transformer_layers_per_block": 10**9}),
        ("unet", {"layers_per_block": 10**9}),
        (
            "unet",
            {
                "block_out_channels": [32] * 10**4,
                "down_block_types": ["DownBlock2D"] * 10**4,
                "up_block_types": ["UpBlock2D"] * 10**4,
            },
        ),
        ("vae", {"layers_per_block": 10**9}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
    ],
)
def test_a_network_of_far_more_modules_than_weights_is_not_built(checkpoint, network, changes):
    edit(checkpoint / network / "config.json", **changes)
    usable = report(checkpoint)["usable"]
    (key, value), *_ = changes.items()
    held = len(open_checkpoint(checkpoint).weights(network))
    assert usable.startswith(f"no: {checkpoint}: {network}/config.json: ")
    assert f"{key} = {str(value)[:50]}" in usable
    assert f"describe more than twice the {held} weights in the file" in usable


@pytest.mark.parametrize(
    ("network", "key"),
    [
        ("vae", "scaling_factor"),
        ("vae", "shift_factor"),
        ("vae", "sample_size"),
        ("unet", "norm_eps"),
        ("unet", "freq_shift"),
        ("text_encoder", "eos_token_id"),
        ("text_encoder", "vocab_size"),
        ("text_encoder", "layer_norm_eps"),
    ],
)
@pytest.mark.parametrize("value", ["1" + "0" * 40, "1e400", "NaN", "1e-400", "1e38"])
def test_a_number_that_devices_cannot_compute_with_is_named(checkpoint, network, key, value):
    path = checkpoint / network / "config.json"
    edit(path, **{key: "here"})
    path.write_text(path.read_text().replace('"here"', value))
    usable = report(checkpoint)["usable"]
    # As a shift, the smallest of them is 0.
    ended = "yes" if (key, value) == ("shift_factor", "1e-400") else f"no: {checkpoint}: {network}"
    assert usable.startswith(ended)
    assert key in usable or usable == "yes"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("vocab.json", {"a": 10**6}, "has 1000001 tokens, but text_encoder has only 641"),
        ("tokenizer_config.json", {"padding_side": "up"}, "no usable tokenizer (ValueError: "),
        (
            "special_tokens_map.json",
            {"pad_token": None},
            "(ValueError: it has no pad_token)",
        ),
        ("special_tokens_map.json", {"eos_token": "<new>"}, "has 642 tokens"),
    ],
)
def test_a_tokenizer_that_generate_would_refuse_is_not_usable(checkpoint, name, change, reason):
    edit(checkpoint / "tokenizer" / name, **change)
    usable = report(checkpoint)["usable"]
    assert usable.startswith(f"no: {checkpoint / 'tokenizer'}")
    assert reason in usable


def test_defaults_may_be_written_as_text(checkpoint):
    edit(checkpoint / "model_index.json", _defaults={"guidance_scale": "2.5", "steps": "7"})
    values = report(checkpoint)
    assert (values["default steps"], values["default guidance"]) == ("7", "2.5")


@pytest.mark.parametrize("values", [{"guidance_scale": [1]}, {"steps": 10**40}])
def test_defaults_of_the_wrong_kind_are_rejected_by_name(checkpoint, values):
    edit(checkpoint / "model_index.json", _defaults=values)
    with pytest.raises(InputError, match=f"model_index.json: _defaults: {next(iter(values))} must"):
        report(checkpoint)


def test_control_characters_in_a_name_are_escaped(checkpoint):
    moved = checkpoint.rename(checkpoint.with_name("\x1b[2J"))
    assert inspect.report(open_checkpoint(moved)).startswith("\\x1b[2J: Stable Diffusion")


def test_an_unsupported_scheduler_setting_is_reported_in_its_line(checkpoint):
    edit(checkpoint / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    assert 'beta_schedule = "sigmoid" is not supported' in report(checkpoint)["default sampler"]


def test_it_needs_no_torch():
    code = (
        "import sys; from jaxdiff import cli; assert cli.main(['inspect', 'shapes64']) == 0; "
        "assert not sys.modules.keys() & {'torch', 'apache_beam'}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("shapes64: Stable Diffusion 1")
    assert done.stdout.splitlines()[-1].split() == ["usable", "yes"]
