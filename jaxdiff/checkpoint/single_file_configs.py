"""The configs that single-file checkpoints lack: each family's, as published on the Hub.

They come from stable-diffusion-v1-5 and from stabilityai's stable-diffusion-xl-base-1.0 and
stable-diffusion-xl-refiner-1.0, as in diffusers' `from_single_file`. Most values that are false or
None there are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxdiff.checkpoint.original.naming import Table

CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
OPENCLIP_BIGG = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
UNET_1 = {
    "_class_name": "UNet2DConditionModel",
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
UNET_XL = UNET_1 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "use_linear_projection": True,
}
UNET_XL_REFINER = UNET_XL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}
VAE_1 = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_XL = VAE_1 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
SCHEDULER_1 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SCHEDULER_XL = SCHEDULER_1 | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
INDEX_1 = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
INDEX_XL = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
INDEX_XL_REFINER = INDEX_XL | {
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "text_encoder": [None, None],
    "tokenizer": [None, None],
}


@dataclass(frozen=True)
class Contents:
    """What a file contains; all files of Stable Diffusion 1 or XL contain the same.

    Attributes:
      name: the name shown to users.
      index: its `model_index.json` on the Hub, but without a safety checker.
      configs: each network's config and the scheduler's, by component.
      prefixes: the prefix of each network's keys, by network.
      tokenizers: the Hub repository and folder of each text encoder's tokenizer.
      names: the table of names, by network; other networks have the names of `original.ldm`.
      base: a model on the Hub that has what a file may lack; None if nothing may be lacking.
    """

    name: str
    index: dict
    configs: dict[str, dict]
    prefixes: dict[str, str]
    tokenizers: dict[str, tuple[str, str]]
    names: Mapping[str, Table] = field(default_factory=dict)
    base: str | None = None


CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", "")
OPENCLIP_TOKENIZER = ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer_2")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CONTENTS = {  # by the width of the text embeddings that the U-Net attends to
    768: Contents(
        name="Stable Diffusion 1",
        index=INDEX_1,
        configs={
            "text_encoder": CLIP_L,
            "unet": UNET_1,
            "vae": VAE_1,
            "scheduler": SCHEDULER_1,
        },
        prefixes={
            "text_encoder": "cond_stage_model.transformer.",
            "unet": UNET,
            "vae": VAE,
        },
        tokenizers={"text_encoder": CLIP_TOKENIZER},
    ),
    2048: Contents(
        name="Stable Diffusion XL",
        index=INDEX_XL,
        configs={
            "text_encoder": CLIP_L,
            "text_encoder_2": OPENCLIP_BIGG,
            "unet": UNET_XL,
            "vae": VAE_XL,
            "scheduler": SCHEDULER_XL,
        },
        prefixes={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
            "unet": UNET,
            "vae": VAE,
        },
        tokenizers={"text_encoder": CLIP_TOKENIZER, "text_encoder_2": OPENCLIP_TOKENIZER},
    ),
    1280: Contents(
        name="Stable Diffusion XL refiner",
        index=INDEX_XL_REFINER,
        configs={
            "text_encoder_2": OPENCLIP_BIGG,
            "unet": UNET_XL_REFINER,
            "vae": VAE_XL,
            "scheduler": SCHEDULER_XL,
        },
        prefixes={
            "text_encoder_2": "conditioner.embedders.0.model.",
            "unet": UNET,
            "vae": VAE,
        },
        tokenizers={"text_encoder_2": OPENCLIP_TOKENIZER},
    ),
}
