"""The keys of LoRA files: which layer of a checkpoint each of them is for. Imports no JAX.

Keys begin with the network, then name the layer, then the matrix. There are many schemes:
diffusers' current one (`transformer.<layer>.lora_A.weight`) and its first one
(`unet.<layers>.attn1.processor.to_q_lora.down.weight`); PEFT's own (`base_model.model.`); kohya's
(`lora_unet_<layer>.lora_down.weight`), which replaces dots by underscores; ComfyUI's
(`diffusion_model.`); and XLabs' (`double_blocks.0.processor.qkv_lora1.down.weight`). A layer has
diffusers' name or that of the model's authors: see `lora_names`. With underscores throughout, all
of them can be matched.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.lora_names import Layer

KEY = re.compile(
    r"""(?P<layer>.+?)
    ( ([._]lora (_linear_layer)? | (?<=_lora[12]))
      [._] (?P<part> A | B | down | up | mid) (\.default)? \.weight
    | ([._]lora)? \.alpha )""",
    re.VERBOSE,
)
PARTS = {"A": "down", "B": "up", None: "alpha"}
T5 = ("text_encoder_3", "text_encoder_2")  # its place in Stable Diffusion 3 and in FLUX.1
# The networks that a prefix may stand for. The first that has such a layer is meant.
PREFIXES = {
    "unet.": ("unet",),
    **dict.fromkeys(("transformer.", "lora_transformer_"), ("transformer",)),
    **dict.fromkeys(("lora_unet_", "diffusion_model."), ("unet", "transformer")),
    **dict.fromkeys(("text_encoder.", "lora_te_", "lora_te1_"), ("text_encoder",)),
    **dict.fromkeys(("text_encoder_2.", "lora_te2_"), ("text_encoder_2",)),
    "text_encoder_3.": ("text_encoder_3",),
    "lora_te3_": T5,
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": T5,
}
NETWORKS = tuple(dict.fromkeys(network for each in PREFIXES.values() for network in each))
# diffusers' first names for the last part of a layer's name.
FIRST_NAMES = {
    **{"to_out_0": "to_out", "q_proj": "to_q", "k_proj": "to_k"},
    **{"v_proj": "to_v", "out_proj": "to_out"},
}
PEFT_PREFIX = "base_model.model."

Names = Mapping[str, Mapping[str, Layer]]


class Place(NamedTuple):
    """What a key is for: a matrix ("down", "up" or "mid") or the "alpha" of a layer."""

    network: str
    layer: Layer
    part: str


def names_of(checkpoint: Checkpoint) -> Names:
    """Returns the layers of each network by each of their names, with underscores."""
    return {
        network: _names(checkpoint, network)
        for network in checkpoint.networks
        if network in NETWORKS
    }


def find(key: str, names: Names) -> Place | None:
    """Returns what a key is for, or None; without a prefix, the first network that fits counts."""
    found = KEY.fullmatch(key)
    if not found:
        return None
    prefix, name = _split(found["layer"])
    for network in PREFIXES[prefix] if prefix else names:
        if name in names.get(network, {}):
            return Place(network, names[network][name], PARTS.get(found["part"], found["part"]))
    return None


def describe_misfit(unknown: Sequence[str], count: int, names: Names) -> str:
    """Says which of a file's keys fit no layer, and the layer whose name is nearest to the first.

    Args:
      unknown: those keys; empty if the file is.
      count: the number of the file's keys.
      names: those of the checkpoint.
    """
    if not unknown:
        return "it is empty"
    found = KEY.fullmatch(unknown[0])
    _, name = _split(found["layer"] if found else unknown[0])
    every = {
        name: f"{network}.{layer.keys[0]}"
        for network in names
        for name, layer in names[network].items()
    }
    near = difflib.get_close_matches(name, every, n=1)
    nearest = f", nearest to {every[near[0]]}" if near else ""
    return f"{len(unknown)} of its {count} keys fit no layer (the first is {unknown[0]}{nearest})"


def _names(checkpoint: Checkpoint, network: str) -> dict[str, Layer]:
    keys = {
        key.removesuffix(".weight").replace(".", "_"): key
        for key, tensor in checkpoint.weights(network).items()
        if key.endswith(".weight") and len(tensor.shape) in (2, 4)
    }
    names = {name: Layer((key,)) for name, key in keys.items()}
    for new, first in FIRST_NAMES.items():
        names |= {
            name.removesuffix(new) + first: Layer((key,))
            for name, key in keys.items()
            if name.endswith(new)
        }
    for original, layer in checkpoint.family.kohya_names(checkpoint, network).items():
        names[original.removesuffix(".weight").replace(".", "_")] = layer
    prefix = checkpoint.family.components[network].prefix.replace(".", "_")
    return names | {f"{prefix}{name}": layer for name, layer in names.items()}


def _split(layer: str) -> tuple[str, str]:
    """Returns the prefix of a layer in a file, "" if it has none, and its name in `names_of`."""
    prefix = next(filter(layer.startswith, PREFIXES), "")
    name = layer.removeprefix(prefix).removeprefix(PEFT_PREFIX)
    return prefix, name.replace(".processor", "").replace(".", "_")
