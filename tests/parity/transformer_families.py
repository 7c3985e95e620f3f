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


FAMILIES: Mapping[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "PixArt-Sigma": lambda: _pixart(
        diffusers.PixArtSigmaPipeline,
        sample_size=32,
        use_additional_conditions=False,
        interpolation_scale=2,
    ),
    "PixArt-Alpha": lambda: _pixart(diffusers.PixArtAlphaPipeline, sample_size=128),
}


def save(name: str, directory: Path) -> Path:
    """Writes the small checkpoint of a family of `FAMILIES`; returns the directory."""
    torch.manual_seed(sorted(FAMILIES).index(name))
    FAMILIES[name]().save_pretrained(directory)
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
