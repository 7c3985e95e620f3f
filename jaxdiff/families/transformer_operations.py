"""Counts the operations of a transformer from the shapes of its weights.

Which operations count is described in `operations`. Imports no JAX.
"""

import re
from collections.abc import Callable, Mapping

from jaxdiff.checkpoint.tensors import StoredTensor

UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d+)\.")


def of_network(
    weights: Mapping[str, StoredTensor],
    rows: Callable[[str], int],
    pairs: Callable[[str], int],
) -> int:
    """Counts the operations of one evaluation of a transformer for one image.

    Args:
      weights: the weights by diffusers' keys.
      rows: maps a weight's key to the number of rows (of tokens) that it is multiplied with.
      pairs: maps the key of a layer of queries to the number of pairs of a query and a key.
    """
    total = 0
    for key, tensor in weights.items():
        if len(tensor.shape) < 2:
            continue
        total += 2 * tensor.size * rows(key)
        if key.endswith("to_q.weight"):
            total += 2 * 2 * pairs(key) * tensor.shape[0]  # scores, and weighted values
    return total


def of_decoder(
    weights: Mapping[str, StoredTensor], height: int, width: int, *, deepest_first: bool
) -> int:
    """Counts the operations of decoding an image, each layer at the size that its block works at.

    Args:
      weights: the autoencoder's weights by diffusers' keys.
      height, width: the size in latents.
      deepest_first: whether `up_blocks` are numbered from the smallest size to the largest.
    """
    decoder = {key: tensor for key, tensor in weights.items() if key.startswith("decoder.")}
    last = max((int(found[1]) for key in decoder if (found := UP_BLOCK.match(key))), default=0)

    def rows(key: str) -> int:
        found = UP_BLOCK.match(key)
        if found:
            doublings = int(found[1]) if deepest_first else last - int(found[1])
        else:
            doublings = last if key.startswith(("decoder.conv_out.", "decoder.norm_out.")) else 0
        return height * width * 4**doublings

    return of_network(decoder, rows, lambda key: 0)
