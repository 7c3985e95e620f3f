"""The layers that LoRA files name as the model's authors do. Imports no JAX.

The authors' layers often do the work of several of ours. Which ones, the tables in `original` say.
"""

from typing import NamedTuple

from jaxdiff.checkpoint.original.naming import WEIGHT, Names, fused, module
from jaxdiff.checkpoint.tensors import StoredTensor


class Layer(NamedTuple):
    """A layer of a LoRA file.

    Attributes:
      keys: our keys of its weights; the file has their rows one below the other, in this order.
      halves_swapped: whether the first half of the file's rows is the last half of ours.
    """

    keys: tuple[str, ...]
    halves_swapped: bool = False


def layers_of(names: Names) -> dict[str, Layer]:
    """Returns the layers that have these names, by their keys in the file."""
    layers = {}
    for ours, theirs, convert in names:
        keys = layers[theirs].keys if theirs in layers else ()
        layers[theirs] = Layer((*keys, ours), halves_swapped=convert is StoredTensor.swap)
    return layers


def xlabs_names(config: dict) -> Names:
    """Yields the names of FLUX.1's attention in XLabs' files.

    In double blocks, 1 is the image's stream and 2 the text's.
    """
    for i in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{i}.attn", f"double_blocks.{i}"
        yield from fused(f"{ours}.to_*", f"{theirs}.qkv_lora1", WEIGHT)
        yield from fused(f"{ours}.add_*_proj", f"{theirs}.qkv_lora2", WEIGHT)
        yield from module(f"{ours}.to_out.0", f"{theirs}.proj_lora1", WEIGHT)
        yield from module(f"{ours}.to_add_out", f"{theirs}.proj_lora2", WEIGHT)
    for i in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from fused(f"{ours}.attn.to_*", f"{theirs}.qkv", WEIGHT)
        yield from module(f"{ours}.proj_out", f"{theirs}.proj", WEIGHT)
