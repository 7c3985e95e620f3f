"""The one compiled program: sample latents, decode, round to 8 bits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff.diffusion import guidance, objective, sampling
from jaxdiff.diffusion.step_ranges import StepRange
from jaxdiff.families.model import Codec, Model


class Inputs(NamedTuple):
    """All that a batch brings: the program's arguments beside weights and sampler table.

    Attributes:
      noise: float32 [batch, h, w, latent channels].
      fresh_noise: float32 [draws, batch, h, w, latent channels], None for a deterministic sampler.
      positive, negative: for each denoiser, its conditioning: a tree of arrays [batch, ...]; the
        latter None where nothing is guided.
      guidance_scale: float32 [batch].
    """

    noise: Any
    fresh_noise: Any
    positive: Sequence[Any]
    negative: Sequence[Any]
    guidance_scale: Any


class Weights(NamedTuple):
    """The parameters of the networks, or their places.

    Attributes:
      denoisers: a tree for each.
      codec: the autoencoder's.
    """

    denoisers: Sequence[dict]
    codec: dict


AXES = Inputs(noise=0, fresh_noise=1, positive=0, negative=0, guidance_scale=0)  # of the batch


class Denoising(NamedTuple):
    """How a denoiser is evaluated; static under `jax.jit`.

    Attributes:
      model: its family's networks.
      prediction_type: as in `objective.to_x0`.
    """

    model: Model
    prediction_type: str


def sample_pixels(
    denoisers: Sequence[Denoising],
    codec: Codec,
    dtype,
    weights: Weights,
    inputs: Inputs,
    initial_scale: Array,
    columns: dict[str, Array],
    *,
    step_ranges: Sequence[StepRange],
    decoded_at_once: int,
    guidance_rescale: float = 0.0,
    deep_cache: int = 1,
) -> tuple[Array, Array]:
    """The pure function from noise to pixels, for `jax.jit`.

    Args:
      denoisers: of the base model, or of it and its refiner.
      codec: the autoencoder.
      dtype: of the networks' arithmetic; the sampler's own is float32.
      weights: of the denoisers and of the codec.
      inputs: of the batch.
      initial_scale, columns: of a `SamplerTable`.
      step_ranges: cover the rows of the table.
      decoded_at_once: so many images, a divisor of the batch.
      guidance_rescale, deep_cache: as in `Options`.

    Returns:
      pixels uint8 [batch, h * factor, w * factor, 3], and whether each image was finite, [batch].
    """
    walk = [
        (
            rows,
            denoiser(
                denoisers[index],
                weights.denoisers[index],
                dtype,
                inputs.positive[index],
                inputs.negative[index] if guided else None,
                inputs.guidance_scale,
                guidance_rescale,
            ),
        )
        for index, rows, guided in step_ranges
    ]
    latents = sampling.sample(
        walk, inputs.noise, initial_scale, columns, inputs.fresh_noise, whole_every=deep_cache
    )

    def decode(latents: Array) -> tuple[Array, Array]:
        images = codec.decode(weights.codec, latents, dtype)
        return to_pixels(images), jnp.isfinite(images).all(axis=(1, 2, 3))

    if decoded_at_once == len(latents):
        return decode(latents)
    turns = latents.reshape(-1, decoded_at_once, *latents.shape[1:])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(decode, turns))


def denoiser(
    denoising: Denoising,
    params: dict,
    dtype,
    positive,
    negative,
    guidance_scale: Array,
    guidance_rescale: float,
) -> sampling.Denoiser:
    """Makes what `sampling.sample` takes: guided, if there is something to steer away from.

    Args: as in `sample_pixels`, of one denoiser.
    """
    network, guided = denoising.model.denoiser, negative is not None
    conditioning = jax.tree.map(guidance.paired, negative, positive) if guided else positive

    def denoise(
        x: Array, timestep: Array, alpha: Array, sigma: Array, kept: Any
    ) -> tuple[Array, Any]:
        latents = (guidance.paired(x, x) if guided else x).astype(dtype)
        output, kept = network.evaluate(
            params,
            latents,
            jnp.full(latents.shape[0], timestep),
            conditioning,
            guidance_scale if network.guidance_is_input else None,
            kept,
        )
        output = output.astype(jnp.float32)
        if guided:
            output = guidance.guide(output, guidance_scale, guidance_rescale)
        return objective.to_x0(output, x, alpha, sigma, denoising.prediction_type), kept

    return denoise


def to_pixels(images: Array) -> Array:
    """Images in -1..1 to uint8, rounded to the nearest."""
    return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def to_float(pixels: Array) -> Array:
    """uint8 pixels to the networks' -1..1, float32."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0
