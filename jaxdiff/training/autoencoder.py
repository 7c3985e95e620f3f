"""The training objective of the autoencoder (Kingma and Welling, 2014, arXiv:1312.6114)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.component import CONFIG
from jaxdiff.checkpoint.json_files import write_json
from jaxdiff.engine.program import to_float, to_pixels
from jaxdiff.errors import InputError
from jaxdiff.families.components import AUTOENCODER_KL
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.training.loop import Params, Task, grid
from jaxdiff.training.recipe import AutoencoderRecipe
from jaxdiff.weights.save import save_params
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS

PREVIEW_SEED = 2**31
VALIDATION_SEED = 2**31 + 1


def render_batch(seed: int, step: int, count: int, crop: int = CANVAS) -> np.ndarray:
    """Draws random crops of new scenes for one step: uint8 [count, crop, crop, 3]."""
    rng = np.random.default_rng([seed, step])
    images = np.stack([shapes.render(shapes.sample(rng)[0]) for _ in range(count)])
    corners = rng.integers(CANVAS - crop, size=(count, 2), endpoint=True)
    return np.stack(
        [
            image[top : top + crop, left : left + crop]
            for image, (top, left) in zip(images, corners, strict=True)
        ]
    )


def task(recipe: AutoencoderRecipe) -> Task:
    """Builds the task that trains encoder and decoder together.

    Raises:
      InputError: if the crop does not fit the autoencoder.
    """
    config = AutoencoderKLConfig.from_json(recipe.vae)
    if recipe.crop % config.factor:
        raise InputError(
            f"crop = {recipe.crop} must be a multiple of {config.factor}, the downscaling factor "
            "of the vae"
        )
    graph, state = nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(recipe.seed)))

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        model = nnx.merge(graph, params)
        images = to_float(batch["pixels"])
        mean, log_variance = model.encode(images)
        noise = jax.random.normal(key, mean.shape)
        decoded = model.decode(mean + jnp.exp(0.5 * log_variance) * noise)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        error, metrics = _reconstruction_error(decoded, images, recipe.gradient_weight)
        return error + recipe.kl_weight * kl, {**metrics, "kl": kl}

    def export(params: Params, frozen: Params, directory: Path) -> None:
        scaled = replace(config, scaling_factor=latent_scale(graph, params, recipe.seed))
        save_autoencoder(directory, scaled, params)

    return Task(
        params=nnx.to_pure_dict(state),
        frozen={},
        loss=loss,
        batch=lambda step: {
            "pixels": render_batch(recipe.seed, step, recipe.batch_size, recipe.crop)
        },
        validation=[{"pixels": render_batch(VALIDATION_SEED, 0, recipe.batch_size, recipe.crop)}],
        preview=lambda params, frozen: _reconstructions(graph, params),
        export=export,
    )


def save_autoencoder(directory: Path, config: AutoencoderKLConfig, params: Params) -> None:
    """Writes the config and the float32 weights in the layout of a checkpoint's `vae/`."""
    directory.mkdir(exist_ok=True)
    save_params(params, directory / AUTOENCODER_KL.weights_file, np.float32)
    write_json(directory / CONFIG, config.to_json())


def latent_scale(graph: nnx.GraphDef, params: Params, seed: int) -> float:
    """Returns 1 / std of the latents of 256 scenes, as in Rombach et al., appendix G."""
    pixels = render_batch(seed, PREVIEW_SEED, 256)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(to_float(x))[0])
    return round(1.0 / float(jnp.std(encode(params, pixels))), 5)


def _reconstruction_error(decoded: Array, images: Array, gradient_weight: float):
    """Computes the mean absolute error of pixels and of differences between neighboring pixels."""
    pixels = jnp.mean(jnp.abs(decoded - images))
    edges = sum(
        jnp.mean(jnp.abs(jnp.diff(decoded, axis=axis) - jnp.diff(images, axis=axis)))
        for axis in (1, 2)
    )
    squared = jnp.mean((decoded - images) ** 2)
    return pixels + gradient_weight * edges, {"reconstruction": pixels, "squared_error": squared}


def _reconstructions(graph: nnx.GraphDef, params: Params) -> np.ndarray:
    """Draws rows of scenes, each row above its reconstructions."""
    pixels = render_batch(PREVIEW_SEED, 0, 32)
    both = [pixels, np.asarray(_reconstruct(graph, params, pixels))]
    rows = np.stack([images.reshape(4, 8, 64, 64, 3) for images in both], axis=1)
    return grid(rows.reshape(64, 64, 64, 3), columns=8)


@partial(jax.jit, static_argnums=0)
def _reconstruct(graph: nnx.GraphDef, params: Params, pixels: Array) -> Array:
    model = nnx.merge(graph, params)
    return to_pixels(model.decode(model.encode(to_float(pixels))[0]))
