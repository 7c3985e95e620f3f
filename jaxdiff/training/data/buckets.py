"""Chooses and crops the images of each batch, as a function of only the seed and the step.

A run can therefore resume in the middle of an epoch from its step number, on any thread or machine,
and checkpoints contain no data state.
"""

import bisect
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.images import fitting
from jaxdiff.training.data.encoded import EncodedExamples
from jaxdiff.training.data.examples import Examples

IMAGES, ORDER, EPOCH = range(3)  # independent random streams


def buckets(size: int, aspect_ratios: float, multiple: int) -> list[tuple[int, int]]:
    """Returns the sizes that images are resized to, all of about the same area.

    Args:
      size: the side of the square in pixels.
      aspect_ratios: the largest ratio of longer to shorter side; 1 gives only the square.
      multiple: heights and widths are multiples of this.

    Returns:
      (height, width) in pixels, the tallest first; none has more pixels than the square.

    Raises:
      InputError: if `size` or `aspect_ratios` is invalid.
    """
    if size < 1 or size % multiple:
        raise InputError(
            f"a size of {size} must be a multiple of {multiple}, as the model requires"
        )
    if not 1 <= aspect_ratios < float("inf"):
        raise InputError(f"the largest aspect ratio must be 1 or more, not {aspect_ratios}")
    found = set()
    for short in range(multiple, size + multiple, multiple):
        long = size * size // short // multiple * multiple
        if long <= aspect_ratios * short:
            found |= {(long, short), (short, long)}
    return sorted(found, reverse=True)


def batches(
    examples: Examples | EncodedExamples,
    *,
    batch_size: int,
    seed: int,
    sizes: Sequence[tuple[int, int]],
    flip: bool = False,
    random_crop: bool = True,
    among: Sequence[int] | None = None,
) -> Callable[[int], dict]:
    """Returns a function that makes batches, in each of which all images have the same size.

    Each image is assigned to the size with the nearest aspect ratio. Within a size, each epoch is a
    permutation of the images; those that do not fill a batch are carried over to the next epoch, so
    no image is dropped and all are seen equally often. (NumPy draws the permutations because
    `grain` shuffles a single sequence, and here each size has its own.)

    Args:
      sizes: (height, width) to resize images to, from `buckets`.
      flip: mirror half of the images.
      random_crop: crop at a random position instead of the center.
      among: the indices of the examples to use; None uses all.

    Returns:
      a function from a step to {"pixels": uint8 [batch, h, w, 3], "captions": list of str}, and
      "control", of the form of "pixels", if there are control images. For encoded images,
      "latents", float32 [batch, h, w, channels], drawn from the posterior, replace the pixels, and
      any embeddings are added: "context" [batch, tokens, width], "pooled" [batch, width], "mask"
      [batch, tokens]. The function is thread-safe, and raises InputError for an image that cannot
      be decoded.

    Raises:
      InputError: if an image is smaller than its target size, or if encoded images do not match
        `sizes` or `flip`.
    """
    rows = np.arange(len(examples)) if among is None else np.asarray(among)
    is_encoded = isinstance(examples, EncodedExamples)
    if is_encoded and flip:
        raise InputError(
            f"data.flip: the latents in {examples.path} cannot be mirrored; set it to false"
        )
    of_size = (_encoded_sizes if is_encoded else assign)(examples, sizes, rows)
    groups = [rows[of_size == number] for number in range(len(sizes))]
    choose = _choice([len(group) for group in groups], batch_size, seed)

    def batch(step: int) -> dict:
        number, places = choose(step)
        indices = [int(index) for index in groups[number][places]]
        rng = np.random.default_rng([seed, IMAGES, step])
        if is_encoded:
            return _encoded_batch(examples, indices, rng)
        return _pixel_batch(examples, indices, sizes[number], rng, flip, random_crop)

    return batch


def assign(
    examples: Examples, sizes: Sequence[tuple[int, int]], among: Sequence[int] | None = None
) -> np.ndarray:
    """Returns the index of the size with the nearest aspect ratio for each image, int [n].

    Args:
      sizes: (height, width) of each bucket.
      among: the indices of the examples to assign; None assigns all.

    Raises:
      InputError: if an image is smaller than its size.
    """
    rows = np.arange(len(examples)) if among is None else np.asarray(among)
    found, wanted = examples.sizes[rows], np.array(sizes)
    ratios = np.log(found[:, :1] / found[:, 1:]) - np.log(wanted[:, 0] / wanted[:, 1])
    of_size = np.abs(ratios).argmin(axis=1)
    small = np.flatnonzero((found < wanted[of_size]).any(axis=1))
    if len(small):
        (height, width), needed = found[small[0]], wanted[of_size[small[0]]]
        raise InputError(
            f"{examples.names[rows[small[0]]]} has {width}x{height} pixels but needs "
            f"{needed[1]}x{needed[0]}; {len(small)} of {len(rows)} images are too small; remove "
            "them or choose a smaller size"
        )
    return of_size


def fitted(examples: Examples, indices: Sequence[int], size: tuple[int, int]) -> dict:
    """Returns images cropped in the middle to (height, width), in the form of `batches`."""
    return _pixel_batch(examples, [*indices], size, np.random.default_rng(0), False, False)


def _pixel_batch(
    examples: Examples,
    indices: list[int],
    size: tuple[int, int],
    rng: np.random.Generator,
    flip: bool,
    random_crop: bool,
) -> dict[str, np.ndarray | list[str]]:
    count = len(indices)
    positions = rng.random((count, 2)) if random_crop else np.full((count, 2), 0.5)
    mirrored = rng.random(count) < 0.5 * flip

    def cut(read: Callable[[int], np.ndarray]) -> np.ndarray:
        chosen = zip(indices, positions, mirrored, strict=True)
        parts = (
            (fitting.fitted(read(index), *size, place), flipped) for index, place, flipped in chosen
        )
        return np.stack([part[:, ::-1] if flipped else part for part, flipped in parts])

    made = {"pixels": cut(examples.pixels)}
    if examples.control_places:
        made["control"] = cut(examples.control)
    return {**made, "captions": [examples.caption(index) for index in indices]}


def _encoded_sizes(
    examples: EncodedExamples, sizes: Sequence[tuple[int, int]], rows: np.ndarray
) -> np.ndarray:
    matches = (examples.sizes[rows][:, None] == np.array(sizes)).all(axis=2)
    if not matches.any(axis=1).all():
        height, width = examples.sizes[rows][~matches.any(axis=1)][0]
        raise InputError(
            f"{examples.path} contains latents for {width}x{height} pixels, which is not a size of "
            "this recipe; set data.size and data.aspect_ratios to the values used for encoding"
        )
    return matches.argmax(axis=1)


def _encoded_batch(
    examples: EncodedExamples, indices: list[int], rng: np.random.Generator
) -> dict[str, np.ndarray | list[str]]:
    means, stds = map(np.stack, zip(*map(examples.posterior, indices), strict=True))
    noise = rng.standard_normal(means.shape, np.float32)
    embedded = [examples.embedding(index) for index in indices]
    return {
        "latents": means + stds * noise,
        "captions": [examples.caption(index) for index in indices],
        **{name: np.stack([one[name] for one in embedded]) for name in examples.empty},
    }


def _choice(
    counts: Sequence[int], batch_size: int, seed: int
) -> Callable[[int], tuple[int, np.ndarray]]:
    """Returns a function that chooses the images of a batch; group g has `counts[g]` images.

    Each group is an endless sequence of permutations of its images, and its batches are consecutive
    parts of the sequence. After e epochs a group has made floor(e * count / batch_size) batches; an
    epoch's batches, of all groups, are in random order.

    Returns:
      a function from a step to a group and to positions in that group, int [batch_size].
    """
    counts = np.array(counts)

    def made(epoch: int) -> np.ndarray:
        return epoch * counts // batch_size

    @lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        groups = np.repeat(np.arange(len(counts)), made(epoch + 1) - made(epoch))
        return np.random.default_rng([seed, ORDER, epoch]).permutation(groups)

    @lru_cache(2 * len(counts))
    def permutation(group: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, EPOCH, group, epoch]).permutation(counts[group])

    def choose(step: int) -> tuple[int, np.ndarray]:
        most = (step + 1 + len(counts)) * batch_size // int(counts.sum()) + 2
        after = bisect.bisect_right(range(most), step, key=lambda epoch: made(epoch).sum())
        epoch = after - 1
        groups, position = order(epoch), step - int(made(epoch).sum())
        group = int(groups[position])
        nth = int(made(epoch)[group] + np.count_nonzero(groups[:position] == group))
        epochs, places = np.divmod(
            np.arange(nth * batch_size, (nth + 1) * batch_size), counts[group]
        )
        return group, np.array(
            [permutation(group, int(e))[place] for e, place in zip(epochs, places, strict=True)]
        )

    return choose
