"""Draws each image's noise from its own seed, whatever its place in a batch."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

KINDS = ("jax", "torch")
TORCH_BLOCK = 16


class Noise(NamedTuple):
    """Standard normal noise for a batch of images, float32.

    Attributes:
      start: [batch, height, width, channels], for the first step.
      fresh: [draws, batch, height, width, channels], for a stochastic sampler; None without draws.
      encoded: [before + after, batch, height, width, channels], for samples of images' latents;
        None if there are none.
    """

    start: Array | np.ndarray
    fresh: Array | np.ndarray | None
    encoded: Array | np.ndarray | None = None


def draw(
    seeds: np.ndarray,
    shape: tuple[int, int, int],
    kind: str,
    draws: int = 0,
    *,
    before: int = 0,
    after: int = 0,
    encoded_shape: tuple[int, int, int] | None = None,
    again: bool = False,
) -> Noise:
    """Draws noise for a batch of images.

    Args:
      seeds: uint32 [batch].
      shape: (height, width, channels) of one image's latents.
      kind: "jax" draws on the device; "torch" reproduces `torch.randn` of a latent tensor
        (channels, height, width) with `torch.Generator("cpu").manual_seed(seed)`, called in the
        order of diffusers' pipelines with a generator for each image: `before` times for encoded
        images, once for the start, `after` times for encoded images, and once for each row of a
        stochastic sampler. Only torch's noise depends on what was drawn before it.
      draws: how many times a stochastic sampler draws fresh noise.
      before, after: how many samples of encoded images are drawn before and after the start.
      encoded_shape: of one of these samples; None for `shape`.
      again: whether this is for the second pass of the same images. Its noise is independent of the
        first one's, but for torch, whose generator begins anew, as in another call of a pipeline.
    """
    seen = encoded_shape or shape
    if kind == "jax":
        return _jax_normal(seeds, shape, draws, seen, before + after, again)
    shapes = [seen] * before + [shape] + [seen] * after + [shape] * draws
    images = [torch_normal(int(seed), [*map(math.prod, shapes)]) for seed in seeds]
    noise = [
        np.stack(flat).reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        for flat, (height, width, channels) in zip(zip(*images, strict=True), shapes, strict=True)
    ]
    encoded, fresh = noise[:before] + noise[before + 1 :][:after], noise[before + 1 + after :]
    return Noise(
        start=noise[before],
        fresh=np.stack(fresh) if fresh else None,
        encoded=np.stack(encoded) if encoded else None,
    )


ENCODED = 2**31  # numbers from here on are of draws for encoded images
AGAIN = 2**30  # the number of the key of a second pass


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _jax_normal(
    seeds: Array,
    shape: tuple[int, int, int],
    draws: int,
    encoded_shape: tuple[int, int, int],
    encoded: int,
    again: bool,
) -> Noise:
    # Named explicitly: JAX's default generator may change, but a seed's image must not.
    keys = jax.vmap(partial(jax.random.key, impl="threefry2x32"))(seeds)
    if again:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, AGAIN)

    def normal(keys: Array, shape: tuple[int, int, int]) -> Array:
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

    def others(first: int, count: int, shape: tuple[int, int, int]) -> Array | None:
        for_draw = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
        numbers = np.arange(first, first + count, dtype=np.uint32)
        drawn = for_draw(keys, numbers)
        return jax.vmap(partial(normal, shape=shape))(drawn) if count else None

    encodings = others(ENCODED, encoded, encoded_shape)
    return Noise(normal(keys, shape), others(0, draws, shape), encodings)


def torch_normal(seed: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """Reproduces calls of `torch.randn(size)` on the CPU, one after the other, after a seed.

    The result is accurate to 5e-7. PyTorch takes 24 bits of each Mersenne Twister word as a uniform
    number and turns blocks of 16 into normal ones by the Box-Muller transform; if the last block is
    incomplete, the last 16 values are drawn again.

    Args:
      seed: 0 to 2**32 - 1, for `manual_seed`.
      sizes: each at least 16; PyTorch draws smaller sizes differently.

    Returns:
      float32 [size] for each.
    """
    if min(sizes) < TORCH_BLOCK:
        raise ValueError(
            f"size = {min(sizes)}: PyTorch's noise needs a size of at least {TORCH_BLOCK}"
        )
    generator = np.random.RandomState(seed)  # seeds MT19937 as PyTorch does
    return [_torch_randn(generator, size) for size in sizes]


def _torch_randn(generator: np.random.RandomState, size: int) -> np.ndarray:
    values = _uniform(generator, size)
    whole = size - size % TORCH_BLOCK
    values[:whole] = _box_muller(values[:whole])
    if whole < size:
        values[-TORCH_BLOCK:] = _box_muller(_uniform(generator, TORCH_BLOCK))
    return values


def _uniform(generator: np.random.RandomState, size: int) -> np.ndarray:
    words = generator.randint(0, 2**32, size, dtype=np.uint32)
    return (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Applies Box and Muller, 1958: each block of 16 becomes eight cosines, then eight sines."""
    first, second = uniform.reshape(-1, 2, TORCH_BLOCK // 2).transpose(1, 0, 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - first))
    angle = np.float32(2.0 * np.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
