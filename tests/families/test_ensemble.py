"""Which base and refiner checkpoints fit together."""

import json
import shutil
from pathlib import Path

import pytest

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble


@pytest.fixture
def refiner(tiny_checkpoint, tmp_path) -> Path:
    """A second model for the same latents, which a test may modify."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "refiner"))


UNET = "unet/diffusion_pytorch_model.safetensors"


def edit_vae(directory: Path, **changes) -> None:
    path = directory / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_channels": 16},
        {"block_out_channels": [8, 16, 32]},
        {"scaling_factor": 0.13025},
        {"shift_factor": 0.1},
        {"latents_mean": [0.0, 0.0, 0.0, 0.0]},
        {"latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_a_refiner_for_other_latents_is_rejected(tiny_checkpoint, refiner, changes):
    edit_vae(refiner, **changes)
    with pytest.raises(InputError, match=r"--refiner .* has different latents from the model"):
        open_ensemble(tiny_checkpoint, refiner=refiner)


def test_missing_config_values_are_the_class_defaults(tiny_checkpoint, refiner):
    path = refiner / "vae" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("scaling_factor") == 0.18215
    assert config.pop("shift_factor") is None
    path.write_text(json.dumps(config))
    assert open_ensemble(tiny_checkpoint, refiner=refiner).refiner.path == refiner


def test_the_variant_is_optional_for_a_refiner(tiny_checkpoint, refiner, tmp_path):
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    shutil.copy(base / UNET, (base / UNET).with_suffix(".fp16.safetensors"))
    opened = open_ensemble(base, "fp16", refiner)
    assert unet_file(opened.base) == "diffusion_pytorch_model.fp16.safetensors"
    assert unet_file(opened.refiner) == "diffusion_pytorch_model.safetensors"
    (refiner / UNET).rename((refiner / UNET).with_suffix(".bf16.safetensors"))
    opened = open_ensemble(base, "fp16", refiner)
    assert unet_file(opened.refiner) == "diffusion_pytorch_model.bf16.safetensors"
    assert unet_file(open_ensemble(base, "fp16", base).refiner) == unet_file(opened.base)
    with pytest.raises(InputError, match="no weights of the variant 'fp16'"):
        open_ensemble(refiner, "fp16", base)


def unet_file(checkpoint: Checkpoint) -> str:
    (file,) = {tensor.file.name for tensor in checkpoint.weights("unet").values()}
    return file
