"""Small ControlNets with random weights: for the tiny checkpoint and for the small FLUX.1 dev."""

import json
from pathlib import Path
from typing import Any

import small_families
from random_weights import random_params

from jaxdiff.models.controlnet import ControlNetConfig, ControlNetModel
from jaxdiff.models.controlnet_union import ControlNetUnionConfig, ControlNetUnionModel
from jaxdiff.models.flux_controlnet import FluxControlNetConfig, FluxControlNetModel
from jaxdiff.weights.save import save_params

UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "conditioning_embedding_out_channels": (4, 4, 8, 8),
}
KINDS = {
    "num_control_type": 3,
    "num_trans_channel": 32,
    "num_proj_channel": 32,
    "addition_time_embed_dim": 8,
}


def of_unet(folder: Path, seed: int, **config) -> Path:
    """Writes a net for the tiny checkpoint; with `KINDS`, a union net."""
    if config.keys() >= KINDS.keys():
        return _written(folder, ControlNetUnionModel, ControlNetUnionConfig(**UNET | config), seed)
    return _written(folder, ControlNetModel, ControlNetConfig(**UNET | config), seed)


def of_flux(folder: Path, seed: int) -> Path:
    """Writes a net for the small FLUX.1 dev."""
    config = vars(small_families.SMALL["FLUX.1 dev"].configs["transformer"])
    return _written(folder, FluxControlNetModel, FluxControlNetConfig(**config), seed)


def _written(folder: Path, network: type, config: Any, seed: int) -> Path:
    folder.mkdir()
    params = random_params(network, config, seed)
    save_params(params, folder / "diffusion_pytorch_model.safetensors", "float32")
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return folder
