"""The autoencoder's objective: reconstruction and KL (Kingma and Welling, 2014)."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checkpoint import diffusers
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.training.loop import Params, Task, grid
from jaxdiff.training.recipe import AutoencoderRecipe
from jaxdiff.worlds import shapes

PREVIEW_SEED = 2**31


def render_batch(seed: int, step: int, count: int) -> np.ndarray:
    """Fresh scenes for one step: uint8 [count, 64, 64, 3]."""
    rng = np.random.default_rng([seed, step])
    return np.stack([shapes.render(shapes.sample(rng)[0]) for _ in range(count)])


def to_float(pixels: Array) -> Array:
    """uint8 pixels to the networks' -1..1, float32."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: Array) -> Array:
    """Images in -1..1 to uint8, rounded to the nearest."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0.0, 255.0)).astype(jnp.uint8)


def _differences(images: Array) -> tuple[Array, Array]:
    return jnp.diff(images, axis=1), jnp.diff(images, axis=2)


def task(recipe: AutoencoderRecipe) -> Task:
    """The objective of `recipe`, ready for `loop.fit`."""
    config = AutoencoderKLConfig.from_json(recipe.vae)
    graphdef, state = nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(recipe.seed)))

    def loss(params: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        model = nnx.merge(graphdef, params)
        images = to_float(batch["pixels"])
        mean, log_variance = model.encode(images)
        noise = jax.random.normal(key, mean.shape)
        decoded = model.decode(mean + jnp.exp(0.5 * log_variance) * noise)
        reconstruction = jnp.mean(jnp.abs(decoded - images))
        edges = sum(
            jnp.mean(jnp.abs(ours - theirs))
            for ours, theirs in zip(_differences(decoded), _differences(images), strict=True)
        )
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        total = reconstruction + recipe.gradient_weight * edges + recipe.kl_weight * kl
        return total, {
            "reconstruction": reconstruction,
            "squared_error": jnp.mean((decoded - images) ** 2),
            "kl": kl,
        }

    @jax.jit
    def reconstruct(params: Params, pixels: Array) -> Array:
        model = nnx.merge(graphdef, params)
        return to_pixels(model.decode(model.encode(to_float(pixels))[0]))

    def preview(params: Params) -> np.ndarray:
        pixels = render_batch(PREVIEW_SEED, 0, 32)
        decoded = np.asarray(reconstruct(params, pixels))
        pairs = np.stack([pixels.reshape(4, 8, 64, 64, 3), decoded.reshape(4, 8, 64, 64, 3)], 1)
        return grid(pairs.reshape(64, 64, 64, 3), columns=8)

    def export(params: Params, directory: Path) -> None:
        scale = latent_scale(graphdef, params, recipe.seed)
        directory.mkdir(exist_ok=True)
        diffusers.save_params(params, directory / "diffusion_pytorch_model.safetensors", np.float32)
        exported = replace(config, scaling_factor=scale)
        diffusers.write_json(directory / "config.json", exported.to_json())

    return Task(
        params=nnx.to_pure_dict(state),
        loss=loss,
        batch=lambda step: {"pixels": render_batch(recipe.seed, step, recipe.batch_size)},
        preview=preview,
        export=export,
    )


def latent_scale(graphdef, params: Params, seed: int) -> float:
    """1 / standard deviation of the latents over 256 scenes, as in Rombach et al., appendix G."""
    pixels = render_batch(seed, PREVIEW_SEED, 256)
    encode = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode(to_float(x))[0])
    return round(1.0 / float(jnp.std(encode(params, pixels))), 5)
