"""A small checkpoint of every transformer family with random weights, written by diffusers.

See `families`, whose structure this follows; widths, layers and vocabularies are small.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import small_tokenizers
import torch
import transformers

VAE = {
    "block_out_channels": (8, 8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
DPM_SOLVER = {  # as in PixArt's files
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "solver_type": "midpoint",
    "timestep_spacing": "linspace",
}
PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "patch_size": 2,
    "caption_channels": 32,
}
T5 = {
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}


def _pixart(pipeline: type, **config) -> diffusers.DiffusionPipeline:
    return pipeline(
        tokenizer=small_tokenizers.t5(),
        text_encoder=_randomised(transformers.T5EncoderModel(transformers.T5Config(**T5))),
        transformer=_randomised(diffusers.PixArtTransformer2DModel(**PIXART, **config)),
        vae=_randomised(diffusers.AutoencoderKL(**VAE)),
        scheduler=diffusers.DPMSolverMultistepScheduler(**DPM_SOLVER),
    )


CLIP = {
    "vocab_size": 641,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "max_position_embeddings": 24,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as in published files: the largest token is meant
    "pad_token_id": 1,
}
VAE_16 = {
    **VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
FLUX_DEV_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 24,
}


def _flux(guidance_embeds: bool, scheduler: Mapping) -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        tokenizer=small_tokenizers.clip(),
        text_encoder=_randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))),
        tokenizer_2=small_tokenizers.t5(),
        text_encoder_2=_randomised(transformers.T5EncoderModel(transformers.T5Config(**T5))),
        transformer=_randomised(
            diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guidance_embeds)
        ),
        vae=_randomised(
            diffusers.AutoencoderKL(**VAE_16, scaling_factor=0.3611, shift_factor=0.1159)
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
    )


def _wider_flux(pipeline: type, more: int) -> diffusers.DiffusionPipeline:
    """FLUX.1 dev whose transformer takes more channels of each token."""
    parts = _flux(True, FLUX_DEV_SCHEDULER).components
    network = diffusers.FluxTransformer2DModel(
        **{**FLUX, "in_channels": 64 + more, "out_channels": 64}, guidance_embeds=True
    )
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler")
    return pipeline(transformer=_randomised(network), **{name: parts[name] for name in names})


def _flux_fill() -> diffusers.FluxFillPipeline:
    """Also takes masked latents and a mask of 64 pixels a latent."""
    return _wider_flux(diffusers.FluxFillPipeline, 64 + 256)


def _flux_control() -> diffusers.FluxControlPipeline:
    """Also takes the latents of a control image."""
    return _wider_flux(diffusers.FluxControlPipeline, 64)


def _flux_kontext() -> diffusers.FluxKontextPipeline:
    """FLUX.1 dev, which sees the image to edit as further tokens."""
    return diffusers.FluxKontextPipeline(**_flux(True, FLUX_DEV_SCHEDULER).components)


def _stable_diffusion_3(with_t5: bool, **config) -> diffusers.StableDiffusion3Pipeline:
    t5 = transformers.T5EncoderModel(transformers.T5Config(**{**T5, "d_model": 64}))
    clips = [
        _randomised(
            transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**CLIP, hidden_act=activation)
            )
        )
        for activation in ("quick_gelu", "gelu")
    ]
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=small_tokenizers.clip(),
        text_encoder=clips[0],
        tokenizer_2=small_tokenizers.clip("!"),
        text_encoder_2=clips[1],
        tokenizer_3=small_tokenizers.t5() if with_t5 else None,
        text_encoder_3=_randomised(t5) if with_t5 else None,
        transformer=_randomised(diffusers.SD3Transformer2DModel(**SD3, **config)),
        vae=_randomised(
            diffusers.AutoencoderKL(**VAE_16, scaling_factor=1.5305, shift_factor=0.0609)
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


QWEN3 = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
Z_IMAGE = {
    "in_channels": 16,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [4, 6, 6],
    "axes_lens": [1024, 32, 32],
}
FLUX_2 = {
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}


def _z_image() -> diffusers.ZImagePipeline:
    return diffusers.ZImagePipeline(
        tokenizer=small_tokenizers.qwen(),
        text_encoder=_randomised(transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3))),
        transformer=_randomised(diffusers.ZImageTransformer2DModel(**Z_IMAGE)),
        vae=_randomised(
            diffusers.AutoencoderKL(**VAE_16, scaling_factor=0.3611, shift_factor=0.1159)
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux_2(is_distilled: bool) -> diffusers.Flux2KleinPipeline:
    qwen = transformers.Qwen3Config(**{**QWEN3, "num_hidden_layers": 28})
    vae = _randomised(diffusers.AutoencoderKLFlux2(**{**VAE, "latent_channels": 32}))
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    return diffusers.Flux2KleinPipeline(
        tokenizer=small_tokenizers.qwen(),
        text_encoder=_randomised(transformers.Qwen3ForCausalLM(qwen)),
        transformer=_randomised(diffusers.Flux2Transformer2DModel(**FLUX_2)),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        is_distilled=is_distilled,
    )


GEMMA_2 = {
    "vocab_size": 368,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
}
SANA = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "sample_size": 32,
    "patch_size": 1,
}
AUTOENCODER_DC = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def _sana() -> diffusers.SanaPipeline:
    return diffusers.SanaPipeline(
        tokenizer=small_tokenizers.gemma(),
        text_encoder=_randomised(transformers.Gemma2Model(transformers.Gemma2Config(**GEMMA_2))),
        transformer=_randomised(diffusers.SanaTransformer2DModel(**SANA)),
        vae=_randomised(diffusers.AutoencoderDC(**AUTOENCODER_DC)),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    )


QWEN_2_5_VL = {
    "text_config": {
        **{key: QWEN3[key] for key in QWEN3.keys() - {"head_dim", "tie_word_embeddings"}},
        "num_hidden_layers": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [1, 1, 2],
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [0],
    },
    "image_token_id": small_tokenizers.IMAGE_TOKEN_ID,
}
QWEN_IMAGE = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
AUTOENCODER_KL_QWEN_IMAGE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


def _qwen_image(pipeline: type, **parts) -> diffusers.DiffusionPipeline:
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(**QWEN_2_5_VL)
    )
    return pipeline(
        tokenizer=small_tokenizers.qwen(),
        text_encoder=_randomised(qwen),
        transformer=_randomised(diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE)),
        vae=_randomised(diffusers.AutoencoderKLQwenImage(**AUTOENCODER_KL_QWEN_IMAGE)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        **parts,
    )


def _qwen_image_edit() -> diffusers.QwenImageEditPipeline:
    """Saved without its processor, whose files need torchvision."""
    return _qwen_image(diffusers.QwenImageEditPipeline, processor=None)


FAMILIES: Mapping[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "PixArt-Sigma": lambda: _pixart(
        diffusers.PixArtSigmaPipeline,
        sample_size=32,
        use_additional_conditions=False,
        interpolation_scale=2,
    ),
    "FLUX.1 dev": lambda: _flux(True, FLUX_DEV_SCHEDULER),
    "FLUX.1 schnell": lambda: _flux(False, {"shift": 1.0}),
    "Stable Diffusion 3": lambda: _stable_diffusion_3(True),
    "Stable Diffusion 3.5": lambda: _stable_diffusion_3(
        True, qk_norm="rms_norm", dual_attention_layers=(0,)
    ),
    "Stable Diffusion 3 without T5": lambda: _stable_diffusion_3(False),
    "Z-Image": _z_image,
    "FLUX.2 klein": lambda: _flux_2(True),
    "FLUX.2 klein base": lambda: _flux_2(False),
    "Sana": _sana,
    "Qwen-Image": lambda: _qwen_image(diffusers.QwenImagePipeline),
    "PixArt-Alpha": lambda: _pixart(diffusers.PixArtAlphaPipeline, sample_size=128),
}


INPAINTING = {"inpainting FLUX.1": _flux_fill}
EDITING = {"instructed FLUX.1": _flux_kontext, "instructed Qwen-Image": _qwen_image_edit}
CONTROLLED = {"controlled FLUX.1": _flux_control}


def save(name: str, directory: Path) -> Path:
    """Writes the small checkpoint of a family of the tables above; returns the directory."""
    every = FAMILIES | INPAINTING | EDITING | CONTROLLED
    torch.manual_seed(sorted(every).index(name))
    every[name]().save_pretrained(directory)
    return directory


def save_flux_controlnet(directory: Path, seed: int, **config) -> Path:
    """Writes a small ControlNet for FLUX.1; returns the directory."""
    torch.manual_seed(seed)
    network = diffusers.FluxControlNetModel(
        **{**FLUX, "num_single_layers": 1, "guidance_embeds": True, **config}
    )
    _randomised(network).save_pretrained(directory)
    return directory


def _randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Draws weights of about the size of trained ones: no norm is one, no bias or gate zero."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "bias":
                weight.normal_(0, 0.1)
            elif "norm" in module and weight.ndim == 1:
                weight.normal_(1, 0.1)
            elif "table" in kind:
                weight.normal_(0, 0.5)
            elif isinstance(network.get_submodule(module), torch.nn.Embedding):
                weight.normal_()
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return network
