"""At full size: the Hub's own configs are read, and give the keys and shapes of their weights."""

import pytest

from jaxdiff.checkpoint.diffusers import abstract_network, file_shapes
from jaxdiff.models.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# As the files stand on the Hub, private keys and all.
UNET_15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_21 = UNET_15 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
VAE_15 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_15 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_21 = TEXT_15 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}


def our_keys(model_class, config) -> dict:
    return file_shapes(abstract_network(model_class, config)[1])


def their_keys(make) -> dict:
    with torch.device("meta"):
        weights = make().state_dict()
    return {key.removeprefix("text_model."): tuple(value.shape) for key, value in weights.items()}


@pytest.mark.parametrize("config", [UNET_15, UNET_21], ids=["1.5", "2.1"])
def test_the_unets_keys_are_those_of_diffusers(config):
    ours = our_keys(UNet2DConditionModel, UNetConfig.from_json(config))
    theirs = their_keys(lambda: diffusers.UNet2DConditionModel.from_config(config))
    assert ours == theirs
    assert len(ours) == 686


def test_the_autoencoders_keys_are_those_of_diffusers():
    ours = our_keys(AutoencoderKL, AutoencoderKLConfig.from_json(VAE_15))
    assert ours == their_keys(lambda: diffusers.AutoencoderKL.from_config(VAE_15))
    assert len(ours) == 248


@pytest.mark.parametrize("config", [TEXT_15, TEXT_21], ids=["1.5", "2.1"])
def test_the_text_encoders_keys_are_those_of_transformers(config):
    ours = our_keys(CLIPTextModel, CLIPTextConfig.from_json(config))
    theirs = their_keys(
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
    )
    assert ours == theirs
