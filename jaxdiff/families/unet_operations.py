"""Counts the operations of a U-Net or an autoencoder's decoder from the shapes of its weights.

Which operations count is described in `operations`. Imports no JAX.
"""

import re
from collections.abc import Mapping

from jaxdiff.checkpoint.tensors import StoredTensor

TOKENS = 77  # of a prompt, if the text encoder's config gives no number
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.")
RESAMPLED = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(down|up)samplers\.")
LAYER = re.compile(r"up_blocks\.(\d+)\.resnets\.(\d+)\.")
DEEP = ("down_blocks.", "mid_block.", "up_blocks.")
ONCE_AN_IMAGE = re.compile(r"\b(time_embedding|add_embedding|time_emb_proj)\.")


def of_network(
    weights: Mapping[str, StoredTensor], height: int, width: int, tokens: int = TOKENS
) -> int:
    """Counts the operations of one evaluation of a U-Net or a decoder for one image.

    Args:
      weights: the weights by diffusers' keys; a decoder's keys without "decoder.".
      height, width: the size in latents.
      tokens: the number of text tokens that cross-attention sees.
    """
    resampled = {found[0] for key in weights if (found := RESAMPLED.match(key))}
    total = 0
    for key, tensor in weights.items():
        if len(tensor.shape) < 2:
            continue
        level = _level(key, resampled)
        positions = _scaled(height, level) * _scaled(width, level)
        if ONCE_AN_IMAGE.search(key):
            positions = 1
        seen = tokens if ".attn2." in key else positions  # keys and values
        if key.endswith(("to_k.weight", "to_v.weight")):
            positions = seen
        elif key.endswith("to_q.weight"):
            total += 2 * 2 * positions * seen * tensor.shape[0]  # scores, and weighted values
        total += 2 * tensor.size * positions
    return total


def _level(key: str, resampled: set[str]) -> int:
    """Returns how many times a layer's input has been halved; negative if it has been doubled."""
    steps = {"down": 1, "up": -1}
    found = BLOCK.match(key)
    if key.startswith("conv_out"):
        before = resampled
    elif key.startswith("mid_block"):
        before = {each for each in resampled if each.startswith("down")}
    elif found:
        before = {each for each in resampled if _precedes(each, found[1], int(found[2]))}
        before |= {each for each in resampled if key.startswith(each)}  # its own convolution
    else:
        before = set()
    return sum(steps[RESAMPLED.match(each)[3]] for each in before)


def _precedes(resampler: str, blocks: str, index: int) -> bool:
    its_blocks, its_index, _ = RESAMPLED.match(resampler).groups()
    if its_blocks == blocks:
        return int(its_index) < index
    return its_blocks == "down_blocks"


def _scaled(side: int, level: int) -> int:
    return -(-side >> level) if level > 0 else side << -level


def outermost(weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the weights of the U-Net's layers that no evaluation skips under `deep_cache`."""
    layers = {found[0] for key in weights if (found := LAYER.match(key))}
    block, layer = max(tuple(map(int, LAYER.match(each).groups())) for each in layers)
    last = tuple(f"up_blocks.{block}.{kind}.{layer}." for kind in ("resnets", "attentions"))
    return {
        key: tensor
        for key, tensor in weights.items()
        if key.startswith(last) or not key.startswith(DEEP)
    }
