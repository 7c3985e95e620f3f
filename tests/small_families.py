"""A small checkpoint of every transformer family, written without torch: random weights.

`save` writes a checkpoint in well under a second. Those of tests/parity are written by diffusers.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import small_tokenizers
from random_weights import random_params

from jaxdiff.families import FAMILIES
from jaxdiff.models.codecs.autoencoder_dc import AutoencoderDCConfig
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKLConfig
from jaxdiff.models.codecs.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from jaxdiff.models.codecs.autoencoder_kl_qwen_image import AutoencoderKLQwenImageConfig
from jaxdiff.models.flux import FluxConfig
from jaxdiff.models.flux2 import Flux2Config
from jaxdiff.models.pixart import PixArtConfig
from jaxdiff.models.qwen_image import QwenImageConfig
from jaxdiff.models.sana import SanaConfig
from jaxdiff.models.sd3 import SD3Config
from jaxdiff.models.text.clip import CLIPTextConfig
from jaxdiff.models.text.gemma2 import Gemma2Config
from jaxdiff.models.text.qwen import Qwen2_5_VLConfig, Qwen3Config
from jaxdiff.models.text.qwen_vision import Qwen2_5_VLVisionConfig
from jaxdiff.models.text.qwen_vl import Qwen2_5_VLImageConfig
from jaxdiff.models.text.t5 import T5Config
from jaxdiff.models.z_image import ZImageConfig
from jaxdiff.weights.save import save_pipeline

CLIP = CLIPTextConfig(
    vocab_size=641,
    hidden_size=32,
    intermediate_size=64,
    projection_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=24,
    bos_token_id=639,
    eos_token_id=640,
    pad_token_id=640,
)
PROJECTED_CLIP = replace(CLIP, architectures=("CLIPTextModelWithProjection",))
T5 = T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3 = Qwen3Config(**DECODER, vocab_size=280, num_hidden_layers=3, head_dim=16)
VAE = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
VAE_16 = AutoencoderKLConfig(
    **VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1
)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DYNAMIC = FLOW | {"use_dynamic_shifting": True}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}


@dataclass(frozen=True)
class Small:
    """A small checkpoint: its pipeline, networks, scheduler and other entries of its index."""

    pipeline: str
    configs: dict[str, Any]
    scheduler: dict
    index: dict = field(default_factory=dict)

    def changed(self, component: str, **changes) -> "Small":
        """The checkpoint with other values in a network's config."""
        config = replace(self.configs[component], **changes)
        return replace(self, configs=self.configs | {component: config})

    def without(self, component: str) -> "Small":
        """The checkpoint without a text encoder and its tokenizer."""
        configs = {name: config for name, config in self.configs.items() if name != component}
        tokenizer = FAMILIES[self.pipeline].components[component].tokenizer
        absent = {name: [None, None] for name in (component, tokenizer)}
        return replace(self, configs=configs, index=self.index | absent)


def _flux(guidance_embeds: bool, scheduler: dict) -> Small:
    transformer = FluxConfig(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    networks = {"text_encoder": CLIP, "text_encoder_2": T5}
    return Small("FluxPipeline", networks | {"transformer": transformer, "vae": VAE_16}, scheduler)


STABLE_DIFFUSION_3 = Small(
    "StableDiffusion3Pipeline",
    {
        "text_encoder": PROJECTED_CLIP,
        "text_encoder_2": PROJECTED_CLIP,
        "text_encoder_3": replace(T5, d_model=64),
        "transformer": SD3Config(
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            **HEADS,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=24,
        ),
        "vae": VAE_16,
    },
    FLOW,
)
PIXART = Small(
    "PixArtSigmaPipeline",
    {
        "text_encoder": T5,
        "transformer": PixArtConfig(
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=1,
            cross_attention_dim=48,
            caption_channels=32,
            sample_size=32,
            use_additional_conditions=False,
        ),
        "vae": AutoencoderKLConfig(**VAE),
    },
    {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"},
)
Z_IMAGE = Small(
    "ZImagePipeline",
    {
        "text_encoder": QWEN3,
        "transformer": ZImageConfig(
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=32,
            axes_dims=(4, 6, 6),
            axes_lens=(1024, 32, 32),
        ),
        "vae": VAE_16,
    },
    FLOW,
)
FLUX_2 = Small(
    "Flux2KleinPipeline",
    {
        "text_encoder": replace(QWEN3, num_hidden_layers=27),
        "transformer": Flux2Config(
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            joint_attention_dim=96,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        "vae": AutoencoderKLFlux2Config(**VAE),
    },
    DYNAMIC,
    {"is_distilled": True},
)
QWEN_IMAGE = Small(
    "QwenImagePipeline",
    {
        "text_encoder": Qwen2_5_VLConfig(
            **DECODER, vocab_size=280, num_hidden_layers=2, mrope_section=(1, 1, 2)
        ),
        "transformer": QwenImageConfig(
            num_layers=2, **HEADS, joint_attention_dim=32, axes_dims_rope=(2, 2, 4)
        ),
        "vae": AutoencoderKLQwenImageConfig(base_dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1),
    },
    DYNAMIC | {"shift_terminal": 0.02},
)
QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    pipeline="QwenImageEditPipeline",
    configs=QWEN_IMAGE.configs
    | {
        "text_encoder": Qwen2_5_VLImageConfig(
            QWEN_IMAGE.configs["text_encoder"],
            Qwen2_5_VLVisionConfig(
                depth=2,
                hidden_size=16,
                intermediate_size=16,
                num_heads=2,
                window_size=56,
                fullatt_block_indexes=(1,),
                out_hidden_size=32,
            ),
            small_tokenizers.IMAGE_TOKEN_ID,
        )
    },
)
SANA = Small(
    "SanaPipeline",
    {
        "text_encoder": Gemma2Config(
            **DECODER, vocab_size=368, num_hidden_layers=2, head_dim=8, query_pre_attn_scalar=8
        ),
        "transformer": SanaConfig(
            in_channels=8,
            out_channels=8,
            num_layers=1,
            **HEADS,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        "vae": AutoencoderDCConfig(
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
    },
    {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    },
)
SMALL = {
    "FLUX.1 dev": _flux(True, DYNAMIC),
    "FLUX.1 schnell": _flux(False, FLOW | {"shift": 1.0}),
    "FLUX.2 klein": FLUX_2,
    "PixArt-Sigma": PIXART,
    "Qwen-Image": QWEN_IMAGE,
    "Qwen-Image-Edit": QWEN_IMAGE_EDIT,
    "Sana": SANA,
    "Stable Diffusion 3": STABLE_DIFFUSION_3,
    "Stable Diffusion 3 without T5": STABLE_DIFFUSION_3.without("text_encoder_3"),
    "Z-Image": Z_IMAGE,
}
TOKENIZERS = {
    CLIPTextConfig: small_tokenizers.clip,
    T5Config: small_tokenizers.t5,
    Qwen3Config: small_tokenizers.qwen,
    Qwen2_5_VLConfig: small_tokenizers.qwen,
    Qwen2_5_VLImageConfig: small_tokenizers.qwen,
    Gemma2Config: small_tokenizers.gemma,
}


def save(small: Small, directory: Path) -> Path:
    """Writes a checkpoint; returns its directory, with the tokenizers' sources beside it."""
    family = FAMILIES[small.pipeline]
    architectures = family.networks().architectures
    tokenizers, params = {}, {}
    for seed, (name, config) in enumerate(small.configs.items()):
        params[name] = random_params(architectures[name].module(config), config, seed)
        if type(config) in TOKENIZERS:
            tokenizers[name] = directory.with_name(f"{directory.name}-{name}-tokenizer")
            TOKENIZERS[type(config)]().save_pretrained(tokenizers[name])
    if "bn" in params["vae"]:
        params["vae"]["bn"]["running_var"] = np.abs(params["vae"]["bn"]["running_var"])
    save_pipeline(
        directory,
        components=family.components,
        configs=small.configs,
        params=params,
        scheduler=small.scheduler,
        tokenizers=tokenizers,
        pipeline={"_class_name": small.pipeline, **family.absent, **small.index},
        dtype=np.float32,
    )
    return directory
