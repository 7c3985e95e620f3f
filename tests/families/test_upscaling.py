"""Upscalers' checkpoints that cannot be used are refused in one line that names the file."""

import json
import shutil
from pathlib import Path

import pytest

from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.model import networks_of
from jaxdiff.families.upscaling import LATENT_PIPELINE, X4_PIPELINE
from jaxdiff.models.k_unet import DOWN_BLOCKS, UP_BLOCKS, KUNetConfig
from jaxdiff.models.unet_upscaler import UNetUpscalerConfig

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
LATENT_UNET = {
    "act_fn": "gelu",
    "block_out_channels": [32, 32, 64, 64],
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_dim": 32,
    "down_block_types": list(DOWN_BLOCKS),
    "in_channels": 8,
    "mid_block_type": None,
    "norm_num_groups": None,
    "out_channels": 5,
    "time_cond_proj_dim": 160,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "up_block_types": list(UP_BLOCKS),
}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def x4(tiny_checkpoint, tmp_path) -> Path:
    """The tiny checkpoint, said to be an x4 upscaler; these tests read no weights."""
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "x4"))
    edit_json(directory / "model_index.json", _class_name=X4_PIPELINE)
    edit_json(directory / "unet" / "config.json", in_channels=7, num_class_embeds=1000)
    folder = directory / "low_res_scheduler"
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps(BETAS))
    return directory


@pytest.fixture
def latent(tiny_checkpoint, tmp_path) -> Path:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "latent"))
    edit_json(directory / "model_index.json", _class_name=LATENT_PIPELINE)
    (directory / "unet" / "config.json").write_text(json.dumps(LATENT_UNET))
    edit_json(directory / "scheduler" / "scheduler_config.json", prediction_type="sample")
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        networks_of(open_checkpoint(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_noise_in_the_image_is_that_of_its_own_schedule(x4):
    opened = open_checkpoint(x4)
    signal, noise = opened.family.image_noise(opened)
    assert signal**2 + noise**2 == pytest.approx(1)
    assert noise == pytest.approx(0.05195, abs=1e-5)  # as in diffusers' DDPMScheduler
    before = opened.fingerprint
    edit_json(x4 / "low_res_scheduler" / "scheduler_config.json", beta_end=0.03)
    opened = open_checkpoint(x4)
    assert opened.family.image_noise(opened)[1] > noise
    assert opened.fingerprint != before


def test_a_schedule_of_the_image_that_is_missing_is_named(x4):
    shutil.rmtree(x4 / "low_res_scheduler")
    assert "low_res_scheduler/scheduler_config.json" in refusal(x4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta_schedule": "cubic"}, "beta_schedule"),
        ({"beta_start": 0.5, "beta_end": 0.9}, "beta_start"),
        ({"num_train_timesteps": 20}, "must be above 20"),
    ],
)
def test_a_schedule_of_the_image_that_cannot_be_used_is_named(x4, changes, said):
    edit_json(x4 / "low_res_scheduler" / "scheduler_config.json", **changes)
    assert "low_res_scheduler/scheduler_config.json: " in refusal(x4)
    assert said in refusal(x4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 4}, "in_channels = 4 does not fit the other networks, which need 7"),
        ({"num_class_embeds": None}, "num_class_embeds is missing"),
        ({"num_class_embeds": 20}, "num_class_embeds = 20 must be above 20"),
        ({"only_cross_attention": [True]}, "only_cross_attention must be 2 times true or false"),
    ],
)
def test_a_unet_that_is_no_x4_upscalers_is_named(x4, changes, said):
    edit_json(x4 / "unet" / "config.json", **changes)
    assert said in refusal(x4)


def test_x4_scales_latents_as_diffusers_does_whatever_the_file_says(x4):
    edit_json(x4 / "vae" / "config.json", scaling_factor=0.18215)
    assert networks_of(open_checkpoint(x4)).configs["vae"].scaling_factor == 0.08333


def test_the_latent_upscaler_predicts_v_though_its_file_says_sample(latent):
    for said in ("sample", "original_sample"):
        edit_json(latent / "scheduler" / "scheduler_config.json", prediction_type=said)
        opened = open_checkpoint(latent)
        assert opened.defaults.scheduler["prediction_type"] == "v_prediction"
    edit_json(latent / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    assert "prediction_type = 'epsilon' is not supported by this pipeline" in refusal(latent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out_channels": 4}, "out_channels = 4 does not fit the other networks, which need 5"),
        ({"time_cond_proj_dim": 128}, "time_cond_proj_dim = 128 does not fit"),
        ({"block_out_channels": [32, 64, 64, 64]}, "the last two must be twice the first two"),
        ({"block_out_channels": [24, 24, 48, 48]}, "24 is not a multiple of 32"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "down_block_types"),
        ({"act_fn": "silu"}, "act_fn = 'silu' is not supported"),
        ({"layers_per_block": 10**6}, "layers_per_block = 1000000 describes more modules"),
    ],
)
def test_a_unet_that_is_no_latent_upscalers_is_named(latent, changes, said):
    edit_json(latent / "unet" / "config.json", **changes)
    assert said in refusal(latent)


def test_a_key_that_is_missing_has_diffusers_default_which_may_be_another():
    KUNetConfig.from_json(LATENT_UNET)
    for key in ("act_fn", "conv_in_kernel", "time_embedding_type"):
        lacking = {name: value for name, value in LATENT_UNET.items() if name != key}
        with pytest.raises(InputError, match=rf"unet/config\.json: {key} = "):
            KUNetConfig.from_json(lacking)


def test_only_cross_attention_may_be_one_value_for_all_blocks():
    config = UNetUpscalerConfig.from_json({"num_class_embeds": 9, "only_cross_attention": True})
    assert config.sees_text_only == (True,) * 4
