"""Draws each image's noise from its own seed, whatever its place in a batch."""

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
    """
    if kind == "jax":
        return _jax_normal(seeds, shape, draws, before + after)
    height, width, channels = shape
    count = before + 1 + after + draws
    images = [torch_normal(int(seed), height * width * channels, count) for seed in seeds]
    noise = np.stack(images, axis=1).reshape(count, -1, channels, height, width)
    noise = noise.transpose(0, 1, 3, 4, 2)
    encoded = np.concatenate([noise[:before], noise[before + 1 :][:after]])
    return Noise(
        start=noise[before],
        fresh=noise[before + 1 + after :] if draws else None,
        encoded=encoded if len(encoded) else None,
    )


ENCODED = 2**31  # numbers from here on are of draws for encoded images


@partial(jax.jit, static_argnums=(1, 2, 3))
def _jax_normal(seeds: Array, shape: tuple[int, int, int], draws: int, encoded: int) -> Noise:
    # Named explicitly: JAX's default generator may change, but a seed's image must not.
    keys = jax.vmap(partial(jax.random.key, impl="threefry2x32"))(seeds)
    normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))

    def others(first: int, count: int) -> Array | None:
        for_draw = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
        numbers = np.arange(first, first + count, dtype=np.uint32)
        return jax.vmap(normal)(for_draw(keys, numbers)) if count else None

    return Noise(normal(keys), others(0, draws), others(ENCODED, encoded))


def torch_normal(seed: int, size: int, draws: int = 1) -> np.ndarray:
    """Reproduces `draws` calls of `torch.randn(size)` on the CPU after `manual_seed(seed)`.

    The result is accurate to 5e-7. PyTorch takes 24 bits of each Mersenne Twister word as a uniform
    number and turns blocks of 16 into normal ones by the Box-Muller transform; if the last block is
    incomplete, the last 16 values are drawn again.

    Args:
      seed: 0 to 2**32 - 1.
      size: at least 16; PyTorch draws smaller sizes differently.
      draws: at least 1.

    Returns:
      float32 [draws, size].
    """
    if size < TORCH_BLOCK:
        raise ValueError(f"size = {size}: PyTorch's noise needs a size of at least {TORCH_BLOCK}")
    generator = np.random.RandomState(seed)  # seeds MT19937 as PyTorch does
    return np.stack([_torch_randn(generator, size) for _ in range(draws)])


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
