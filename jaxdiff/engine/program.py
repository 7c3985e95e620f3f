"""The one compiled program: sample latents, decode, round to 8 bits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.diffusion import guidance, objective, sampling
from jaxdiff.diffusion.step_ranges import Stretch
from jaxdiff.engine.expert import Conditioning, Network
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKLConfig


def sample_pixels(
    networks: Sequence[Network],
    vae_graph: nnx.GraphDef,
    vae_config: AutoencoderKLConfig,
    dtype,
    params: dict,
    noise: Array,
    fresh_noise: Array | None,
    positive: Sequence[Conditioning],
    negative: Sequence[Conditioning | None],
    guidance_scale: Array,
    initial_scale: Array,
    columns: dict[str, Array],
    *,
    stretches: Sequence[Stretch],
    decoded_at_once: int,
    guidance_rescale: float = 0.0,
    deep_cache: int = 1,
) -> tuple[Array, Array]:
    """The pure function from noise to pixels, for `jax.jit`.

    Args:
      networks: the denoisers, of one expert or several.
      vae_graph, vae_config: of the autoencoder.
      dtype: of the networks' arithmetic; the sampler's own is float32.
      params: "unets", those of each expert, and "vae".
      noise: float32 [batch, h, w, latent channels].
      fresh_noise: float32 [draws, batch, h, w, latent channels], None for a deterministic sampler.
      positive, negative: what each expert is told; the latter None where nothing is guided.
      guidance_scale: [batch].
      initial_scale, columns: of a `SamplerTable`.
      stretches: cover the rows of the table.
      decoded_at_once: so many images, a divisor of the batch.
      guidance_rescale, deep_cache: as in `Options`.

    Returns:
      pixels uint8 [batch, h * factor, w * factor, 3], and whether each image was finite, [batch].
    """
    denoisers = [
        (
            rows,
            denoiser(
                networks[expert],
                params["unets"][expert],
                dtype,
                positive[expert],
                negative[expert] if guided else None,
                guidance_scale,
                guidance_rescale,
            ),
        )
        for expert, rows, guided in stretches
    ]
    latents = sampling.sample(
        denoisers, noise, initial_scale, columns, fresh_noise, whole_every=deep_cache
    )
    vae = nnx.merge(vae_graph, params["vae"])

    def decode(latents: Array) -> tuple[Array, Array]:
        images = vae.decode(vae_config.unscale(latents).astype(dtype)).astype(jnp.float32)
        return to_pixels(images), jnp.isfinite(images).all(axis=(1, 2, 3))

    if decoded_at_once == len(latents):
        return decode(latents)
    turns = latents.reshape(-1, decoded_at_once, *latents.shape[1:])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(decode, turns))


def denoiser(
    network: Network,
    params: dict,
    dtype,
    positive: Conditioning,
    negative: Conditioning | None,
    guidance_scale: Array,
    guidance_rescale: float,
) -> sampling.Denoiser:
    """What `sampling.sample` takes: guided, if there is something to steer away from.

    Args: as in `sample_pixels`, of one expert.
    """
    unet, guided = nnx.merge(network.graph, params), negative is not None
    told = jax.tree.map(guidance.paired, negative, positive) if guided else positive

    def denoise(
        x: Array, timestep: Array, alpha: Array, sigma: Array, deep: Array | None
    ) -> tuple[Array, Array]:
        latents = (guidance.paired(x, x) if guided else x).astype(dtype)
        output, deep = unet.evaluate(
            latents,
            jnp.full(latents.shape[0], timestep),
            deep=deep,
            **told._asdict(),
            guidance_scale=guidance_scale if network.distilled else None,
        )
        output = output.astype(jnp.float32)
        if guided:
            output = guidance.guide(output, guidance_scale, guidance_rescale)
        return objective.to_x0(output, x, alpha, sigma, network.prediction_type), deep

    return denoise


def to_pixels(images: Array) -> Array:
    """Images in -1..1 to uint8, rounded to the nearest."""
    return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def to_float(pixels: Array) -> Array:
    """uint8 pixels to the networks' -1..1, float32."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0
