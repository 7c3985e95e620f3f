"""The keys of LoRA files: which layer of a checkpoint each of them is for. Imports no JAX.

A key names the network, then the layer, then the matrix. There are many schemes:

- diffusers' current one: `transformer.<layer>.lora_A.weight`
- diffusers' first one: `unet.<layer>.attn1.processor.to_q_lora.down.weight`
- PEFT's own: `base_model.model.<layer>.lora_A.weight`
- kohya's: `lora_unet_<layer>.lora_down.weight`, where the layer has underscores instead of dots
- ComfyUI's: `diffusion_model.<layer>.lora_A.weight`
- XLabs': `double_blocks.0.processor.qkv_lora1.down.weight`

The layer has diffusers' name or that of the model's authors (see `lora_names`). All names are
compared with underscores instead of dots.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.lora_names import Layer, layers_of
from jaxdiff.checkpoint.original.naming import Table
from jaxdiff.errors import InputError

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

LayersByName = Mapping[str, Mapping[str, Layer]]  # of each network


class Place(NamedTuple):
    """What a key is for: a layer's matrix ("down", "up" or "mid") or its "alpha"."""

    network: str
    layer: Layer
    part: str


def names_of(checkpoint: Checkpoint) -> LayersByName:
    """Returns each network's layers by all names that they may have, with underscores."""
    return {
        network: _names(checkpoint, network)
        for network in checkpoint.networks
        if network in NETWORKS
    }


def find(key: str, names: LayersByName) -> Place | None:
    """Returns what a key is for, or None if no layer has its name.

    A key without a prefix belongs to the first network that has such a layer.
    """
    found = KEY.fullmatch(key)
    if not found:
        return None
    prefix, name = _split(found["layer"])
    for network in PREFIXES[prefix] if prefix else names:
        if name in names.get(network, {}):
            return Place(network, names[network][name], PARTS.get(found["part"], found["part"]))
    return None


def describe_misfit(unknown: Sequence[str], count: int, names: LayersByName) -> str:
    """Says how many of a file's keys fit no layer, and which layer's name is nearest to the first.

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


def original_layers(
    tables: Sequence[Table], checkpoint: Checkpoint, network: str
) -> dict[str, Layer]:
    """Returns a network's layers by their keys in tables of original names.

    Raises:
      InputError: if the network's config does not describe such a network.
    """
    config, most = checkpoint.config(network), len(checkpoint.weights(network))
    try:
        # No more names than there are weights, for the config has not been read strictly.
        names = chain.from_iterable(islice(table(config), most) for table in tables)
        return layers_of(names)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = "a U-Net" if network == "unet" else f"a {network}"
        raise InputError(
            f"{checkpoint.place(network)} does not describe {what}; copy the checkpoint again"
        ) from error


def _names(checkpoint: Checkpoint, network: str) -> dict[str, Layer]:
    matrices = {
        key: Layer((key,))
        for key, tensor in checkpoint.weights(network).items()
        if key.endswith(".weight") and len(tensor.shape) in (2, 4)
    }
    names = {_name(key): layer for key, layer in matrices.items()}
    for new, first in FIRST_NAMES.items():
        names |= {
            name.removesuffix(new) + first: layer
            for name, layer in names.items()
            if name.endswith(new)
        }
    names |= {
        _name(original): layer
        for original, layer in checkpoint.family.kohya_names(checkpoint, network).items()
        if matrices.keys() >= set(layer.keys)
    }
    prefix = checkpoint.family.components[network].prefix.replace(".", "_")
    return names | {f"{prefix}{name}": layer for name, layer in names.items()}


def _name(key: str) -> str:
    return key.removesuffix(".weight").replace(".", "_")


def _split(layer: str) -> tuple[str, str]:
    """Returns the prefix of a layer in a file, "" if it has none, and its name in `names_of`."""
    prefix = next(filter(layer.startswith, PREFIXES), "")
    name = layer.removeprefix(prefix).removeprefix(PEFT_PREFIX)
    return prefix, name.replace(".processor", "").replace(".", "_")
