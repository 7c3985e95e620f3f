"""Single files of transformer models: the transformer alone, or with other parts. Imports no JAX.

Black Forest Labs' files hold the transformer alone. Stability AI's, and ComfyUI's whole files, add
a prefix to it, and may have an autoencoder and text encoders. What is missing comes from a base
model in the diffusers layout; so does the scheduler, if there is a base.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from jaxdiff.checkpoint.original import flux, flux2, sd3, text_encoders, z_image
from jaxdiff.checkpoint.original.naming import Names, Shapes, Table
from jaxdiff.checkpoint.single_file_configs import (
    CLIP_TOKENIZER,
    OPENCLIP_TOKENIZER,
    UNET,
    VAE,
    VAE_1,
    Contents,
)
from jaxdiff.checkpoint.tensors import StoredTensor

# All models have the same tokenizer for T5; the repositories of FLUX.1 and Stable Diffusion 3 are
# gated, so it is fetched from another.
T5_TOKENIZER = ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "tokenizer")
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLUX_DEV_SCHEDULER = FLOW | {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "use_dynamic_shifting": True,
}


class Original(Protocol):
    """The original naming of a transformer: a module in `original`.

    Attributes:
      CLASS: the transformer's class in diffusers.
    """

    CLASS: str

    def config(self, shapes: Shapes) -> dict:
        """Returns the config that a file's shapes tell; raises InputError if they do not fit."""

    def names(self, config: dict) -> Names:
        """Yields the transformer's names."""


@dataclass(frozen=True)
class Encoder:
    """A text encoder of whole files.

    Attributes:
      class_name: in transformers.
      prefix: of its keys.
      config: finds its config in the shapes of its tensors.
      names: the table of its names.
      tokenizer: the Hub repository and folder of its tokenizer.
    """

    class_name: str
    prefix: str
    config: Callable[[Shapes], dict]
    names: Table
    tokenizer: tuple[str, str]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      probes: starts of keys that together distinguish its transformer from those after it in
        `FORMATS`.
      name: the name shown to users.
      pipeline: the class of its pipeline in diffusers.
      base: a model on the Hub that has the other parts.
      transformer: the original naming of its transformer.
      encoders: the text encoders that whole files have, by component.
      vae: the factors in the autoencoder's config; empty if files have no autoencoder.
      scheduler: the scheduler's config, unless there is a base.
    """

    probes: tuple[str, ...]
    name: str
    pipeline: str
    base: str
    transformer: Original
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    vae: Mapping[str, float] = field(default_factory=dict)
    scheduler: dict = field(default_factory=lambda: FLOW)


CLIP_L = Encoder(
    "CLIPTextModel",
    "text_encoders.clip_l.transformer.",
    text_encoders.clip_l_config,
    text_encoders.clip_names,
    CLIP_TOKENIZER,
)
PROJECTED_CLIP_L = Encoder(
    "CLIPTextModelWithProjection",
    CLIP_L.prefix,
    text_encoders.projected_clip_l_config,
    text_encoders.projected_clip_l_names,
    CLIP_L.tokenizer,
)
CLIP_G = Encoder(
    "CLIPTextModelWithProjection",
    "text_encoders.clip_g.transformer.",
    text_encoders.clip_g_config,
    text_encoders.clip_g_names,
    OPENCLIP_TOKENIZER,
)
T5 = Encoder(
    "T5EncoderModel",
    "text_encoders.t5xxl.transformer.",
    text_encoders.t5_config,
    text_encoders.t5_names,
    T5_TOKENIZER,
)
STABLE_DIFFUSION_3 = Format(
    probes=("joint_blocks.",),
    name="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    base="stabilityai/stable-diffusion-3.5-medium",
    transformer=sd3,
    encoders={"text_encoder": PROJECTED_CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    vae={"scaling_factor": 1.5305, "shift_factor": 0.0609},
)
FLUX_SCHNELL = Format(
    probes=("double_blocks.",),
    name="FLUX.1 schnell",
    pipeline="FluxPipeline",
    base="black-forest-labs/FLUX.1-schnell",
    transformer=flux,
    encoders={"text_encoder": CLIP_L, "text_encoder_2": T5},
    vae={"scaling_factor": 0.3611, "shift_factor": 0.1159},
    scheduler=FLOW | {"shift": 1.0},
)
FORMATS = (
    Format(
        probes=("double_stream_modulation_img.", flux.GUIDANCE),
        name="FLUX.2 dev",
        pipeline="Flux2Pipeline",
        base="black-forest-labs/FLUX.2-dev",
        transformer=flux2,
    ),
    Format(
        probes=("double_stream_modulation_img.",),
        name="FLUX.2 klein",
        pipeline="Flux2KleinPipeline",
        base="black-forest-labs/FLUX.2-klein-4B",
        transformer=flux2,
    ),
    replace(
        FLUX_SCHNELL,
        probes=(*FLUX_SCHNELL.probes, flux.GUIDANCE),
        name="FLUX.1 dev",
        base="black-forest-labs/FLUX.1-dev",
        scheduler=FLUX_DEV_SCHEDULER,
    ),
    FLUX_SCHNELL,
    STABLE_DIFFUSION_3,
    Format(
        probes=("cap_embedder.", "layers.0.adaLN_modulation.0."),
        name="Z-Image",
        pipeline="ZImagePipeline",
        base="Tongyi-MAI/Z-Image-Turbo",
        transformer=z_image,
    ),
)


def contents(path: Path, tensors: Mapping[str, StoredTensor]) -> Contents | None:
    """Returns what a file contains, or None if it has no transformer of these kinds.

    Args:
      path: the file.
      tensors: all of its tensors, by key.

    Raises:
      InputError: if the shapes of its tensors do not give a config.
    """
    for prefix in (UNET, ""):
        for kind in FORMATS:
            starts = [prefix + probe for probe in kind.probes]
            if all(any(key.startswith(start) for key in tensors) for start in starts):
                return _contents(path, tensors, kind, prefix)
    return None


def _contents(
    path: Path, tensors: Mapping[str, StoredTensor], kind: Format, prefix: str
) -> Contents:
    prefixes = {name: encoder.prefix for name, encoder in kind.encoders.items()}
    prefixes["transformer"] = prefix
    if kind.vae:
        prefixes["vae"] = _vae_prefix(tensors)
    found = {
        name: Shapes(path, kind.name, start, tensors)
        for name, start in prefixes.items()
        if any(key.startswith(start) for key in tensors)
    }
    encoders = {name: encoder for name, encoder in kind.encoders.items() if name in found}
    configs = {name: encoder.config(found[name]) for name, encoder in encoders.items()}
    configs["transformer"] = kind.transformer.config(found["transformer"])
    if "vae" in found:
        configs["vae"] = _vae_config(found["vae"]) | kind.vae
    names = {name: encoder.names for name, encoder in encoders.items()}
    return Contents(
        name=kind.name,
        index=_index(kind, found),
        configs=configs | {"scheduler": kind.scheduler},
        prefixes={name: prefixes[name] for name in found},
        tokenizers={name: encoder.tokenizer for name, encoder in encoders.items()},
        names=names | {"transformer": kind.transformer.names},
        base=kind.base,
    )


def _vae_prefix(tensors: Mapping[str, StoredTensor]) -> str:
    return VAE if any(key.startswith(VAE) for key in tensors) else "vae."


def _vae_config(shapes: Shapes) -> dict:
    levels = shapes.count("decoder.up")
    return VAE_1 | {
        "block_out_channels": [
            shapes.size(f"decoder.up.{i}.block.0.conv1.weight", 0) for i in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": shapes.size("decoder.conv_in.weight", 1),
        "layers_per_block": shapes.count("encoder.down.0.block"),
        "sample_size": 1024,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }


def _index(kind: Format, found: Collection[str]) -> dict:
    """Returns the `model_index.json` of what was found, which names no tokenizers."""
    classes = {name: ["transformers", each.class_name] for name, each in kind.encoders.items()}
    classes["transformer"] = ["diffusers", kind.transformer.CLASS]
    classes["vae"] = ["diffusers", "AutoencoderKL"]
    return {
        "_class_name": kind.pipeline,
        "scheduler": ["diffusers", kind.scheduler["_class_name"]],
        **{name: each if name in found else [None, None] for name, each in classes.items()},
    }
