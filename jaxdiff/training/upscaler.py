"""The training objective of GAN upscalers: pixels first, then against a discriminator.

Wang et al., 2021, arXiv:2107.10833. Generator and discriminator are trained in one step by one
loss: each term is a function of the weights of one of them only, since the other's are held fixed.
So a run resumes as every other does. Their perceptual loss is left out: it needs VGG's weights.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.lax import stop_gradient
from PIL import Image

from jaxdiff.checkpoint.upscaler import NETWORK, SCALES
from jaxdiff.engine.program import to_pixels
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint, upscaler_model
from jaxdiff.families.upscaler import UPSCALER
from jaxdiff.images import decoding
from jaxdiff.models.discriminator import Discriminator
from jaxdiff.models.rrdb import RRDBNetConfig
from jaxdiff.models.srvgg import SLOPE, SRVGGNetConfig
from jaxdiff.training import strict
from jaxdiff.training.data.degradation import degraded, resized
from jaxdiff.training.loop import Params, Task, grid
from jaxdiff.training.recipe import UpscalerRecipe
from jaxdiff.weights.load import load_params, places
from jaxdiff.weights.save import save_params
from jaxdiff.worlds import shapes

FILE = "upscaler.safetensors"
CONFIGS = {"srvgg": SRVGGNetConfig, "rrdb": RRDBNetConfig}  # by their tables in a recipe
SHAPES = "shapes"
CROPS = 4  # of each image in a batch: rendering and decoding take longer than cutting
SMOOTH = 0.1  # of 1, the width of the smooth part of the error
SMALL = 0.001  # share of the usual weights that a new network's last convolution begins with
GAIN = np.sqrt(2 / (1 + SLOPE**2))  # of convolutions before leaky ReLUs
VALIDATION_SEED, PREVIEW_SEED = 2**31 + 1, 2**31
VALIDATION_BATCHES = 4
PREVIEWED = 4  # images
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def task(recipe: UpscalerRecipe) -> Task:
    """Builds the task that trains an upscaler, and a discriminator with it if the recipe asks.

    Raises:
      InputError: if the model to begin with is no upscaler, if the recipe names no network or two,
        if the crop does not fit, or if the folder has no images.
    """
    config, params = _generator(recipe)
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: upscaler_model.module(NETWORK, config)(config, rngs=nnx.Rngs(0)))
    )
    judge, judging = None, {}
    if recipe.adversarial_weight:
        if recipe.crop * config.scale % 8:
            raise InputError(f"crop = {recipe.crop} must be a multiple of {8 // config.scale}")
        judge, state = nnx.split(
            Discriminator(recipe.discriminator_features, rngs=nnx.Rngs(recipe.seed + 1))
        )
        judging = {"discriminator": nnx.to_pure_dict(state)}
    large = _large_images(recipe, config.scale)

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        small, real = (batch[name].astype(jnp.float32) / 255 for name in ("small", "large"))
        fake = nnx.merge(graph, params["generator"])(small)
        error, metrics = _error(fake, real, recipe.gradient_weight)
        if judge is None:
            return error, metrics
        weights = params["discriminator"]
        held, trained = (nnx.merge(judge, each) for each in (stop_gradient(weights), weights))
        fools = jnp.mean(nnx.softplus(-held(fake)))
        judged = jnp.mean(nnx.softplus(-trained(real)))
        judged += jnp.mean(nnx.softplus(trained(stop_gradient(fake))))
        total = error + recipe.adversarial_weight * fools + judged
        return total, {**metrics, "generator_loss": fools, "discriminator_loss": judged}

    def export(params: Params, frozen: Params, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_params(params["generator"], directory / FILE, np.float16)

    def batch(seed: int, step: int) -> dict:
        return _batch(large, recipe, config.scale, np.random.default_rng([seed, step]))

    return Task(
        params={"generator": params, **judging},
        frozen={},
        loss=loss,
        batch=lambda step: batch(recipe.seed, step),
        validation=[batch(VALIDATION_SEED, number) for number in range(VALIDATION_BATCHES)],
        preview=lambda params, frozen: _preview(graph, params["generator"], large, recipe, config),
        export=export,
        # How well the discriminator judges says nothing about the generator.
        validated_by=None if judge is None else "reconstruction",
    )


def _error(fake: Array, real: Array, gradient_weight: float) -> tuple[Array, dict]:
    """Returns the error of pixels and of the differences between neighbors, and metrics."""
    pixels = jnp.mean(_smooth(fake - real))
    edges = sum(
        jnp.mean(_smooth(jnp.diff(fake, axis=axis) - jnp.diff(real, axis=axis))) for axis in (1, 2)
    )
    squared = jnp.mean((fake - real) ** 2)
    return pixels + gradient_weight * edges, {"reconstruction": pixels, "squared_error": squared}


def _smooth(error: Array) -> Array:
    """Returns absolute values, but smooth around 0 (Lai et al., 2017, arXiv:1704.03915).

    With plain absolute values, a network that changes nothing is hard to leave: most pixels are in
    flat areas, where any change is as wrong as no change is at an edge.
    """
    return jnp.sqrt(error**2 + SMOOTH**2) - SMOOTH


def _generator(recipe: UpscalerRecipe):
    """Returns the generator's config and its first weights."""
    named = [name for name in ("model", *CONFIGS) if getattr(recipe, name)]
    if len(named) != 1:
        raise InputError(
            f"the recipe names {' and '.join(named) or 'none'} of model, [srvgg] and [rrdb]; "
            "name one of them"
        )
    if recipe.model:
        checkpoint = open_checkpoint(recipe.model)
        if checkpoint.family is not UPSCALER:
            raise InputError(f"model = {recipe.model!r} is {checkpoint.defaults.name}, no upscaler")
        config = upscaler_model.read_configs({NETWORK: checkpoint.config(NETWORK)})[NETWORK]
    else:
        config = _config(named[0], getattr(recipe, named[0]))
    made = upscaler_model.module(NETWORK, config)
    if recipe.model:
        network = upscaler_model.build({NETWORK: config}, {}).networks[NETWORK]
        where = places(network.shapes, jnp.float32)
        return config, load_params(where, checkpoint.weights(NETWORK))
    network = made(config, rngs=nnx.Rngs(recipe.seed))
    if recipe.srvgg:
        convolutions = [layer for layer in network.body if isinstance(layer, nnx.Conv)]
        for layer in convolutions:  # keeps the variance (He et al., 2015, arXiv:1502.01852)
            layer.kernel[...] *= GAIN
    last = convolutions[-1] if recipe.srvgg else network.conv_last
    last.kernel[...] *= SMALL
    return config, nnx.to_pure_dict(nnx.state(network))


def _config(name: str, table: dict):
    """Returns the config of a new network; raises InputError if a value cannot be used."""
    config = strict.build(CONFIGS[name], table, f"the recipe's {name}.")
    for key, value in vars(config).items():
        if value < 1:
            raise InputError(f"the recipe's {name}.{key} must be at least 1, not {value}")
    if name == "rrdb" and config.scale not in SCALES.values():
        raise InputError(f"the recipe's rrdb.scale must be 1, 2 or 4, not {config.scale}")
    return config


def _large_images(
    recipe: UpscalerRecipe, scale: int
) -> Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]]:
    """Returns a function that draws a large image, and the same one small and clean if it can."""
    if recipe.images == SHAPES:

        def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            scene = shapes.sample(rng)[0]
            return shapes.render(scene, scale), shapes.render(scene)

        return drawn
    folder = Path(recipe.images)
    found = folder.rglob("*") if folder.is_dir() else ()
    files = sorted(file for file in found if file.suffix.lower() in ENDINGS)
    if not files:
        raise InputError(
            f'images = {recipe.images!r} is no folder of images; name one, or "shapes"'
        )
    least = recipe.crop * scale

    def read(rng: np.random.Generator) -> tuple[np.ndarray, None]:
        file = files[rng.integers(len(files))]
        image = decoding.decode(file.read_bytes(), str(file))
        if min(image.shape[:2]) < least:
            raise InputError(f"{file} is smaller than crop x scale = {least} px; remove it")
        return image, None

    return read


def _batch(large: Callable, recipe: UpscalerRecipe, scale: int, rng: np.random.Generator) -> dict:
    """Draws a batch: "small", uint8 [batch, crop, crop, 3], and "large", uint8."""
    pairs = []
    while len(pairs) < recipe.batch_size:
        image, clean = large(rng)
        for _ in range(min(CROPS, recipe.batch_size - len(pairs))):
            pairs.append(_crop(image, clean, recipe, scale, rng))
    small, whole = map(np.stack, zip(*pairs, strict=True))
    return {"small": small, "large": whole}


def _crop(
    image: np.ndarray,
    clean: np.ndarray | None,
    recipe: UpscalerRecipe,
    scale: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    crop = recipe.crop
    rooms = [side // scale - crop for side in image.shape[:2]]
    top, left = (int(rng.integers(room, endpoint=True)) for room in rooms)
    cut = image[scale * top : scale * (top + crop), scale * left : scale * (left + crop)]
    if clean is not None and not recipe.degradation.rounds:
        return clean[top : top + crop, left : left + crop], cut
    return degraded(cut, crop, crop, recipe.degradation, rng), cut


def _preview(graph, params: Params, large: Callable, recipe: UpscalerRecipe, config) -> np.ndarray:
    """Draws columns of images: enlarged by bicubic interpolation, by the network, and the truth."""
    rng = np.random.default_rng([PREVIEW_SEED])
    pairs = [_crop(*large(rng), recipe, config.scale, rng) for _ in range(PREVIEWED)]
    small, whole = map(np.stack, zip(*pairs, strict=True))
    made = _enlarge(graph, params, small)
    sides = whole.shape[1:3]
    bicubic = [resized(image, *sides, Image.Resampling.BICUBIC) for image in small]
    return grid(np.concatenate([np.stack(bicubic), np.asarray(made), whole]), columns=PREVIEWED)


def _enlarge(graph, params: Params, small: np.ndarray) -> Array:
    """Enlarges uint8 images [n, h, w, 3]."""
    enlarge = jax.jit(lambda params, x: 2 * nnx.merge(graph, params)(x / 255) - 1)
    return to_pixels(enlarge(params, small.astype(np.float32)))
