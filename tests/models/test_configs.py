"""Unsupported configs are rejected by their key; supported ones survive a round trip."""

import pytest

from jaxdiff.errors import InputError
from jaxdiff.models.codecs.autoencoder_dc import AutoencoderDCConfig
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKLConfig
from jaxdiff.models.sd3 import SD3Config
from jaxdiff.models.text import clip
from jaxdiff.models.unet import UNetConfig

XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "attention_head_dim": [5, 10, 20, 20],
    "transformer_layers_per_block": [1, 2, 10, 10],
}
DC = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (UNetConfig, "layers_per_block", [2, 2, 2, 2]),
        (UNetConfig, "layers_per_block", "2"),
        (UNetConfig, "layers_per_block", True),
        (UNetConfig, "cross_attention_dim", [768, 768, 768, 768]),
        (UNetConfig, "transformer_layers_per_block", [1, [2, 2], 10, 10]),
        (UNetConfig, "transformer_layers_per_block", [1, 2, 10]),
        (UNetConfig, "transformer_layers_per_block", 0),
        (UNetConfig, "reverse_transformer_layers_per_block", [[4, 4], 2]),
        (UNetConfig, "attention_head_dim", [5, 10]),
        (UNetConfig, "block_out_channels", [320, 640, 1280, 1300]),
        (UNetConfig, "block_out_channels", []),
        (UNetConfig, "mid_block_type", None),
        (UNetConfig, "num_attention_heads", 8),
        (UNetConfig, "num_class_embeds", 1000),
        (UNetConfig, "class_embed_type", "timestep"),
        (UNetConfig, "encoder_hid_dim", 4096),
        (UNetConfig, "addition_embed_type", "image"),
        (UNetConfig, "addition_embed_type", "text_time"),  # without its widths
        (UNetConfig, "down_block_types", ["AttnDownBlock2D"] * 4),
        (clip.CLIPTextConfig, "architectures", ["CLIPModel"]),
        (clip.CLIPTextConfig, "hidden_act", "relu"),
        (clip.CLIPTextConfig, "hidden_size", 500),
        (clip.CLIPTextConfig, "eos_token_id", None),
        (AutoencoderKLConfig, "latents_mean", [0.0] * 4),  # without latents_std
        (AutoencoderKLConfig, "norm_num_groups", 7),
        (AutoencoderKLConfig, "scaling_factor", None),
        (AutoencoderDCConfig, "encoder_qkv_multiscales", [5]),
        (SD3Config, "dual_attention_layers", [[0]]),
    ],
)
def test_unsupported_values_are_rejected_with_their_key(config, key, value):
    with pytest.raises(InputError, match=rf"^\w+/config\.json: .*{key}") as refusal:
        config.from_json({key: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (UNetConfig, "norm_num_groups", 0),
        (UNetConfig, "attention_head_dim", [8, 0, 8, 8]),
        (UNetConfig, "block_out_channels", [320, -640, 1280, 1280]),
        (UNetConfig, "layers_per_block", -1),
        (AutoencoderKLConfig, "norm_num_groups", 0),
        (AutoencoderKLConfig, "scaling_factor", 0.0),
        (clip.CLIPTextConfig, "num_attention_heads", 0),
        (AutoencoderDCConfig, "encoder_qkv_multiscales", [[], [], [], [5], [0], [5]]),
    ],
)
def test_sizes_of_zero_or_less_are_rejected_with_their_key(config, key, value):
    with pytest.raises(InputError) as refusal:
        config.from_json({key: value})
    assert f"/config.json: {key} = {value!r} must be above 0" in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "data"),
    [
        (UNetConfig, {}),
        (UNetConfig, {**XL, "time_cond_proj_dim": 256, "sample_size": [96, 64]}),
        (AutoencoderKLConfig, {"latents_mean": [0.5] * 4, "latents_std": [2, 1, 1, 1]}),
        (AutoencoderKLConfig, {"latents_mean": [0, -1, 0, 0], "latents_std": [1.0] * 4}),
        (AutoencoderKLConfig, {"shift_factor": 0.0}),
        (UNetConfig, {"freq_shift": 0}),
        (clip.CLIPTextConfig, {"architectures": ["CLIPTextModelWithProjection"]}),
        (AutoencoderDCConfig, DC | {"encoder_qkv_multiscales": [[]] * 4 + [[3, 5], [5]]}),
        (SD3Config, {"dual_attention_layers": []}),
        (SD3Config, {"dual_attention_layers": [0, 1]}),
    ],
)
def test_configs_survive_a_round_trip(config, data):
    read = config.from_json(data)
    assert config.from_json(read.to_json()) == read
