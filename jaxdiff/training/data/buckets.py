"""Which images are in a batch, and how they are cut: a function of the seed and the step alone.

So a run is resumed in the middle of an epoch by the number of its step, on any thread and machine,
and nothing about the data stands in a checkpoint.
"""

import bisect
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.training.data import decoding
from jaxdiff.training.data.encoded import EncodedExamples
from jaxdiff.training.data.examples import Examples

IMAGES, ORDER, EPOCH = range(3)  # what is drawn at random, each from its own stream


def buckets(size: int, aspect_ratios: float, multiple: int) -> list[tuple[int, int]]:
    """The sizes that images are brought to: those of about one area.

    Args:
      size: pixels, the side of the square.
      aspect_ratios: the largest of longer to shorter side; 1 gives the square alone.
      multiple: what heights and widths are multiples of.

    Returns:
      (height, width) in pixels, the tallest first; none has more pixels than the square.

    Raises:
      InputError: if there are no such sizes.
    """
    if size < 1 or size % multiple:
        raise InputError(f"a size of {size} must be a multiple of {multiple}, as the model asks")
    if not 1 <= aspect_ratios < float("inf"):
        raise InputError(f"aspect ratios of up to {aspect_ratios} must be 1 or more")
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
    """Batches of images of one size each.

    An image belongs to the size whose ratio is nearest. Within a size, each epoch is a permutation
    of its images; what does not fill a batch is carried into the next epoch, so that no image is
    dropped and all are seen equally often. (NumPy draws the permutations: what `grain` shuffles is
    a single sequence, and here each size has its own.)

    Args:
      sizes: (height, width) that images are brought to, from `buckets`.
      flip: mirror half of the images.
      random_crop: cut what is too long somewhere, else in its middle.
      among: the indices of the examples that are used; None is all.

    Returns:
      a step's number to {"pixels": uint8 [batch, h, w, 3], "captions": list of text}. Where images
      are encoded already, "latents", float32 [batch, h, w, channels], drawn from the posterior,
      stand in the place of pixels, and the embeddings, if there are any, beside the captions:
      "context" [batch, tokens, width], "pooled" [batch, width]. It may be called on any thread,
      and raises InputError for an image that cannot be decoded.

    Raises:
      InputError: if images are smaller than what they are to be brought to, or encoded otherwise.
    """
    rows = np.arange(len(examples)) if among is None else np.asarray(among)
    is_encoded = isinstance(examples, EncodedExamples)
    if is_encoded and flip:
        raise InputError(f"data.flip: latents cannot be mirrored, and {examples.path} holds those")
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
    """For each image (of those in `among`), int [n], the number of the size nearest in its ratio.

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
            f"{examples.names[rows[small[0]]]} has {width}x{height} pixels where "
            f"{needed[1]}x{needed[0]} are needed, as {len(small)} of {len(rows)} images have too "
            "few; remove them, or choose a smaller size"
        )
    return of_size


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
    cut = [
        decoding.fitted(examples.pixels(index), *size, position)
        for index, position in zip(indices, positions, strict=True)
    ]
    mirrored = rng.random(count) < 0.5 * flip
    return {
        "pixels": np.stack([p[:, ::-1] if m else p for p, m in zip(cut, mirrored, strict=True)]),
        "captions": [examples.caption(index) for index in indices],
    }


def _encoded_sizes(
    examples: EncodedExamples, sizes: Sequence[tuple[int, int]], rows: np.ndarray
) -> np.ndarray:
    matches = (examples.sizes[rows][:, None] == np.array(sizes)).all(axis=2)
    if not matches.any(axis=1).all():
        height, width = examples.sizes[rows][~matches.any(axis=1)][0]
        raise InputError(
            f"{examples.path} holds latents of {width}x{height} pixels, which is no size of this "
            "recipe; give size and aspect_ratios of the data the values that it was encoded with"
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
    """Which images are in a step's batch, where group g has `counts[g]` images.

    The images of a group are an endless sequence, a permutation after the other, and its batches
    are consecutive parts of it. After e epochs a group has made floor(e count / batch_size) of
    them; an epoch's batches, of all groups, come in a random order.

    Returns:
      a step's number to the group's and to places in the group, int [batch_size].
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
