"""The Hub's own configs give, at full size, the keys and shapes of their weights."""

import jax
import pytest

from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.text import clip
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.weights.load import file_shapes, name_of
from jaxdiff.weights.network import abstract_network
from jaxdiff.weights.quantization import IN_BLOCK

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import networks  # noqa: E402
import references  # noqa: E402  (beside this file)
import test_flux_networks  # noqa: E402
from published_encoders import T5_XXL_FLUX  # noqa: E402

# The files as on the Hub, including private keys.
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
UNET_LCM = UNET_15 | {  # SimianLuo/LCM_Dreamshaper_v7
    "_diffusers_version": "0.22.0.dev0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dropout": 0.0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": 256,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
    "use_linear_projection": False,
}
UNET_XL = {  # stabilityai/stable-diffusion-xl-base-1.0
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
UNET_REFINER = UNET_XL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
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
VAE_XL = VAE_15 | {
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
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


TEXT_XL = TEXT_15 | {"torch_dtype": "float16", "transformers_version": "4.32.0.dev0"}
TEXT_XL_2 = TEXT_XL | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
# That of InstantX and Shakker Labs for many kinds of images, without the kinds.
FLUX_CONTROLNET = test_flux_networks.DEV | {
    "_class_name": "FluxControlNetModel",
    "num_layers": 5,
    "num_single_layers": 10,
}


def our_keys(model_class, config) -> dict:
    return file_shapes(abstract_network(model_class, config)[1])


def their_keys(make) -> dict:
    with torch.device("meta"):
        weights = make().state_dict()
    return {key.removeprefix("text_model."): tuple(value.shape) for key, value in weights.items()}


@pytest.mark.parametrize(
    ("config", "count"),
    [(UNET_15, 686), (UNET_21, 686), (UNET_LCM, 687), (UNET_XL, 1680), (UNET_REFINER, 1220)],
    ids=["1.5", "2.1", "LCM", "XL", "XL refiner"],
)
def test_the_unets_keys_match_diffusers(config, count):
    ours = our_keys(UNet2DConditionModel, UNetConfig.from_json(config))
    theirs = their_keys(lambda: diffusers.UNet2DConditionModel.from_config(config))
    assert ours == theirs
    assert len(ours) == count


@pytest.mark.parametrize("config", [VAE_15, VAE_XL], ids=["1.5", "XL"])
def test_the_autoencoders_keys_match_diffusers(config):
    ours = our_keys(AutoencoderKL, AutoencoderKLConfig.from_json(config))
    assert ours == their_keys(lambda: diffusers.AutoencoderKL.from_config(config))
    assert len(ours) == 248


@pytest.mark.parametrize(
    ("config", "count"),
    [(TEXT_15, 196), (TEXT_21, 372), (TEXT_XL, 196), (TEXT_XL_2, 517)],
    ids=["1.5", "2.1", "XL", "XL 2"],
)
def test_the_text_encoders_keys_match_transformers(config, count):
    network = getattr(transformers, *config["architectures"])
    config_class = transformers.CLIPTextConfig
    read = clip.CLIPTextConfig.from_json(config)
    ours = our_keys(clip.network(read), read)
    assert ours == their_keys(lambda: network(config_class.from_dict(config)))
    assert len(ours) == count


@pytest.mark.parametrize(
    "parts",
    [
        [("unet", UNET_15), ("text_encoder", TEXT_15)],
        [("unet", UNET_XL), ("text_encoder", TEXT_XL), ("text_encoder_2", TEXT_XL_2)],
        [(None, test_flux_networks.DEV), (None, T5_XXL_FLUX)],
        [("controlnet", {"cross_attention_dim": 768})],
        [(None, FLUX_CONTROLNET)],
    ],
    ids=["1.5", "XL", "FLUX.1 dev", "ControlNet of 1.5", "ControlNet of FLUX.1 dev"],
)
def test_weights_of_8_bits_take_at_most_0_55_of_16_bits(parts):
    whole = quantised = 0
    for network, config in parts:
        if network is None:  # of a transformer family
            _, shapes = networks.shapes_of(config)
        else:
            config_class, module = networks.NETWORKS[network]
            read = config_class.from_json(config)
            _, shapes = abstract_network(module(read), read)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            whole += leaf.size
            quantised += leaf.size if IN_BLOCK.search(name_of(path)) else 0
    assert 1 - quantised / whole / 2 <= 0.55


def random_unet(config):
    """Draws weights of about the size of trained ones, much faster than diffusers initialises."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.data.normal_(0 if key.endswith("bias") else 1, 0.1, generator=generator)
    return unet.eval()


@pytest.mark.slow  # half a minute and 5 GB of memory
def test_a_step_of_stable_diffusion_1_5_at_full_size():
    inputs = networks.inputs("unet", UNET_15, size=(64, 64))
    inputs = {name: array[:1] for name, array in inputs.items()}
    reference = random_unet(UNET_15)
    expected = references.outputs(reference, inputs)["output"]
    weights = reference.state_dict()
    del reference
    unet = networks.build("unet", UNET_15, lambda key, shape: weights.pop(key).numpy())
    assert networks.difference(unet(**inputs), expected) <= networks.BOUND
