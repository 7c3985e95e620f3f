"""Small checkpoints of Stable Diffusion's upscalers with random weights, written by diffusers.

The structure is the published one, as in `families`; of blocks of one kind in a row, the x4
upscaler's U-Net has one.
"""

from collections.abc import Callable
from pathlib import Path

import diffusers
import families
import torch
import transformers

X4, LATENT = "x4 upscaler", "latent x2 upscaler"
X4_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
X4_UNET = families.UNET_2 | {
    "in_channels": 7,
    "num_class_embeds": 1000,
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "attention_head_dim": 4,
    "only_cross_attention": (True, True, False),
}
X4_VAE = families.VAE | {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 0.08333,
}
LATENT_UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 5,
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
    "mid_block_type": None,
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": None,
    "cross_attention_dim": 32,
    "attention_head_dim": 16,
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "time_cond_proj_dim": 128 + 32,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
}


def save(name: str, directory: Path) -> Path:
    """Writes the small checkpoint of an upscaler; returns the directory."""
    torch.manual_seed(17)
    pipeline = {X4: _x4, LATENT: _latent}[name]()
    pipeline.save_pretrained(directory)
    return directory


def _x4() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionUpscalePipeline(
        **_networks(X4_UNET, X4_VAE, families.OPEN_CLIP_H),
        tokenizer=_tokenizer("!"),
        low_res_scheduler=diffusers.DDPMScheduler(**X4_BETAS),
        scheduler=diffusers.DDIMScheduler(
            **X4_BETAS,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )


def _latent() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionLatentUpscalePipeline(
        **_networks(LATENT_UNET, families.VAE, families.CLIP_L),
        tokenizer=_tokenizer("<|endoftext|>"),
        scheduler=diffusers.EulerDiscreteScheduler(**families.BETAS, prediction_type="sample"),
    )


def _networks(unet: dict, vae: dict, text: dict) -> dict[str, Callable]:
    networks = {
        "unet": diffusers.UNet2DConditionModel(**unet),
        "vae": diffusers.AutoencoderKL(**vae),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
    }
    for network in networks.values():
        families._randomise(network)
    return networks


def _tokenizer(pad: str):
    return transformers.CLIPTokenizer.from_pretrained(families.TOKENIZER, pad_token=pad)
