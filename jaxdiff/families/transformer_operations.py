"""Counts the operations of a transformer from the shapes of its weights.

Which operations count is described in `operations`. Imports no JAX.
"""

from collections.abc import Callable, Mapping

from jaxdiff.checkpoint.tensors import StoredTensor


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
