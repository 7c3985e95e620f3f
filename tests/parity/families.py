"""A small checkpoint of every family with random weights, written by diffusers.

The structure is the published one: block types, heads for each block, projections, transformer
depths, text encoders and their tokenizers' padding, conditioning, and the scheduler's file as on
the Hub, which lacks some keys. Only widths, layers and the vocabulary are small, and of blocks of
one kind in a row, the U-Nets have one: test_networks has them all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers

TOKENIZER = Path(__file__).parents[2] / "jaxdiff" / "assets" / "shapes64" / "tokenizer"
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
# The published files have eos_token_id 2 for any vocabulary; it denotes the largest token.
TEXT = {
    "vocab_size": 641,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
CLIP_L = TEXT | {"hidden_act": "quick_gelu"}
OPEN_CLIP_H = TEXT | {"hidden_act": "gelu", "hidden_size": 48, "num_hidden_layers": 3}
OPEN_CLIP_G = TEXT | {"hidden_act": "gelu", "hidden_size": 48, "projection_dim": 40}
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 48, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,  # in fact the number of heads
}
UNET_2 = UNET | {
    "attention_head_dim": (2, 3, 4, 4),
    "cross_attention_dim": 48,
    "use_linear_projection": True,
}
UNET_XL = UNET | {
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "attention_head_dim": (2, 3, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 80,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
UNET_REFINER = UNET_XL | {
    "block_out_channels": (32, 48, 64, 64),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "attention_head_dim": (2, 3, 4, 4),
    "transformer_layers_per_block": 2,
    "cross_attention_dim": 48,
    "projection_class_embeddings_input_dim": 40 + 5 * 8,
}
VAE = {
    "sample_size": 64,
    "block_out_channels": (8, 16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
VAE_XL = VAE | {"scaling_factor": 0.13025, "force_upcast": True}
STEPS = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
XL_STEPS = STEPS | {
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Family:
    """The configurations of a checkpoint's components.

    Attributes:
      pipeline: the diffusers pipeline that `model_index.json` names.
      scheduler: `scheduler_config.json` as on the Hub.
      unet, vae, text_encoder, text_encoder_2: the networks' configs; None if the family has none.
      pad: the padding token of the last text encoder's tokenizer; the first of two has CLIP's.
      options: the pipeline's options in `model_index.json`.
    """

    pipeline: type
    scheduler: Mapping
    unet: Mapping
    vae: Mapping = field(default_factory=lambda: VAE)
    text_encoder: Mapping | None = None
    text_encoder_2: Mapping | None = None
    pad: str = "!"
    options: Mapping = field(default_factory=dict)


SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
STABLE_DIFFUSION_2 = Family(
    pipeline=diffusers.StableDiffusionPipeline,
    scheduler={"_class_name": "DDIMScheduler", "prediction_type": "epsilon", **BETAS, **STEPS},
    unet=UNET_2,
    text_encoder=OPEN_CLIP_H,
    options=SAFETY,
)
STABLE_DIFFUSION_XL = Family(
    pipeline=diffusers.StableDiffusionXLPipeline,
    scheduler={"_class_name": "EulerDiscreteScheduler", **BETAS, **XL_STEPS},
    unet=UNET_XL,
    vae=VAE_XL,
    text_encoder=CLIP_L,
    text_encoder_2=OPEN_CLIP_G,
    options={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
)
FAMILIES = {
    "SD 1.5": Family(
        pipeline=diffusers.StableDiffusionPipeline,
        scheduler={"_class_name": "PNDMScheduler", **BETAS, **STEPS},
        unet=UNET,
        text_encoder=CLIP_L,
        pad="<|endoftext|>",
        options=SAFETY,
    ),
    "SD 2.1 base": STABLE_DIFFUSION_2,
    "SD 2.1": Family(
        **vars(STABLE_DIFFUSION_2)
        | {
            "scheduler": STABLE_DIFFUSION_2.scheduler | {"prediction_type": "v_prediction"},
            "unet": UNET_2 | {"upcast_attention": True},
        }
    ),
    "SD-Turbo": Family(
        **vars(STABLE_DIFFUSION_2)
        | {
            "scheduler": {
                "_class_name": "EulerDiscreteScheduler",
                **BETAS,
                **XL_STEPS,
                "timestep_spacing": "trailing",
            }
        }
    ),
    "SDXL": STABLE_DIFFUSION_XL,
    "SDXL refiner": Family(
        pipeline=diffusers.StableDiffusionXLImg2ImgPipeline,
        scheduler=STABLE_DIFFUSION_XL.scheduler,
        unet=UNET_REFINER,
        vae=VAE_XL,
        text_encoder_2=OPEN_CLIP_G,
        options={
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "add_watermarker": False,
        },
    ),
    "SDXL-Turbo": Family(
        **vars(STABLE_DIFFUSION_XL)
        | {
            "scheduler": {
                **STABLE_DIFFUSION_XL.scheduler,
                "_class_name": "EulerAncestralDiscreteScheduler",
                "timestep_spacing": "trailing",
            }
        }
    ),
    "LCM": Family(
        pipeline=diffusers.LatentConsistencyModelPipeline,
        scheduler={
            "_class_name": "LCMScheduler",
            **BETAS,
            "clip_sample": False,
            "original_inference_steps": 50,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_scaling": 10.0,
            "timestep_spacing": "leading",
        },
        unet=UNET | {"time_cond_proj_dim": 16},
        text_encoder=CLIP_L,
        pad="<|endoftext|>",
        options=SAFETY,
    ),
}
# Checkpoints whose U-Net also takes a mask and the latents of what it leaves out.
INPAINTING = {
    f"inpainting {name}": Family(
        **vars(FAMILIES[name])
        | {"pipeline": pipeline, "unet": FAMILIES[name].unet | {"in_channels": 9}}
    )
    for name, pipeline in (
        ("SD 1.5", diffusers.StableDiffusionInpaintPipeline),
        ("SDXL", diffusers.StableDiffusionXLInpaintPipeline),
    )
}
# Checkpoints that edit an image by instruction; their U-Net also takes its latents.
EDITING = {
    "instructed SD 1.5": Family(
        **vars(FAMILIES["SD 1.5"])
        | {
            "pipeline": diffusers.StableDiffusionInstructPix2PixPipeline,
            "unet": UNET | {"in_channels": 8},
        }
    )
}


def save(name: str, directory: Path) -> Path:
    """Writes the small checkpoint of a family of the tables above; returns the directory."""
    every = FAMILIES | INPAINTING | EDITING
    family = every[name]
    torch.manual_seed(sorted(every).index(name))
    networks = {
        "unet": diffusers.UNet2DConditionModel(**shallow(family.unet)),
        "vae": diffusers.AutoencoderKL(**family.vae),
        "text_encoder": _text_encoder(transformers.CLIPTextModel, family.text_encoder),
    }
    tokenizers = {"tokenizer": family.text_encoder and _tokenizer(family.pad)}
    if family.text_encoder_2:
        networks["text_encoder_2"] = _text_encoder(
            transformers.CLIPTextModelWithProjection, family.text_encoder_2
        )
        tokenizers = {
            "tokenizer": family.text_encoder and _tokenizer("<|endoftext|>"),
            "tokenizer_2": _tokenizer(family.pad),
        }
    for network in filter(None, networks.values()):
        _randomise(network)
    scheduler = getattr(diffusers, family.scheduler["_class_name"]).from_config(family.scheduler)
    pipeline = family.pipeline(scheduler=scheduler, **networks, **tokenizers, **family.options)
    pipeline.save_pretrained(directory)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(family.scheduler))
    return directory


def save_controlnet(name: str, directory: Path, seed: int = 0, kinds: int | None = None) -> Path:
    """Writes a small ControlNet for the U-Net of a family; returns the directory.

    With `kinds`, it is a union net for as many kinds of images.
    """
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(**shallow(FAMILIES[name].unet))
    network = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(4, 4, 8, 8)
    )
    if kinds:
        network = union_of(network, kinds)
    _randomise(network)  # its last convolutions were zero
    network.save_pretrained(directory)
    return directory


def union_of(controlnet: diffusers.ControlNetModel, kinds: int, **config):
    """A union net with new weights that is like a ControlNet otherwise."""
    width = controlnet.config.block_out_channels[0]
    given = {key: value for key, value in controlnet.config.items() if key != "mid_block_type"}
    widths = {"num_trans_channel": width, "num_proj_channel": width}
    config = {**given, "num_control_type": kinds, **widths, **config}
    return diffusers.ControlNetUnionModel.from_config(config)


def shallow(unet: Mapping) -> dict:
    """The config with one block where several of one kind follow each other."""
    downs, ups = unet["down_block_types"], unet["up_block_types"]
    kept = [i for i, kind in enumerate(downs) if i == 0 or kind != downs[i - 1]]
    fewer = {
        key: tuple(unet[key][i] for i in kept)
        for key in ("block_out_channels", "attention_head_dim", "transformer_layers_per_block")
        if isinstance(unet.get(key), tuple)  # else one number for all
    }
    blocks = {
        "down_block_types": tuple(downs[i] for i in kept),
        "up_block_types": tuple(ups[-1 - i] for i in reversed(kept)),
    }
    return {**unet, **fewer, **blocks}


def _tokenizer(pad: str):
    return transformers.CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)


def _text_encoder(network: type, config: Mapping | None):
    return config and network(transformers.CLIPTextConfig(**config))


def _randomise(network):
    """Draws weights of about the size of trained ones: no norm is one and no bias zero."""
    norms = {
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm)
    }
    with torch.no_grad():
        for name, weight in network.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "bias":
                weight.normal_(0, 0.1)
            elif module in norms:
                weight.normal_(1, 0.1)
            elif module.endswith("_embedding"):  # of tokens and positions
                weight.normal_()
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)
