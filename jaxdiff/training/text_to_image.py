"""Trains a denoiser, and perhaps its text encoders, on captioned images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.devices import compilation
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion import objective, samplers, scheduler_config
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.step_ranges import StepRange
from jaxdiff.engine.program import (
    Denoising,
    Inputs,
    Pass,
    Route,
    Weights,
    sample_pixels,
    to_float,
)
from jaxdiff.errors import InputError
from jaxdiff.families.model import Model, Text
from jaxdiff.models.sd3 import SD3Config
from jaxdiff.models.unet import UNetConfig
from jaxdiff.request import Bucket
from jaxdiff.training import batches, controlnet, inpainting, low_rank, noise_levels
from jaxdiff.training.components import Components, from_recipe
from jaxdiff.training.loop import Params, Task, captioned
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.training.shapes import places

PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0
DECODED_ALONE_PX = 256  # images with longer sides are decoded one by one
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def task(
    recipe: TextToImageRecipe, output: Path, class_images: batches.ClassImages | None = None
) -> Task:
    """Makes the training task of a recipe, for `loop.fit`.

    Args:
      recipe: the recipe.
      output: the run's directory, which caches prepared data.
      class_images: as in `batches.prepare`.

    Raises:
      InputError: if a component or the data cannot be read, or they do not fit together.
    """
    batches.prepare(recipe, output, class_images)
    parts, remat = from_recipe(recipe), recipe.computing.remat
    if recipe.method == "controlnet":
        parts = controlnet.added(parts, recipe.controlnet, recipe.seed, remat=remat)
    if recipe.method == "inpaint":
        parts = inpainting.widened(parts, remat=remat)
    schedule = scheduler_config.noise_schedule(parts.scheduler, _sampler(parts))
    if parts.model.denoiser.guidance_is_input and not schedule.is_flow:
        raise InputError(
            "the denoiser is distilled: it takes the guidance scale as an input; train its teacher"
        )
    denoiser = parts.model.denoiser
    if denoiser.sees_control or any((denoiser.reference, denoiser.enlarging)):
        raise InputError(
            "the denoiser also sees an image, and training such models is not built; train one "
            "that sees text only"
        )
    params, frozen = _split(parts, recipe, _trained(recipe, parts.model))
    all_params = partial(_all_params, recipe, parts.model)
    made = batches.of(parts, recipe, output)
    return Task(
        params=params,
        frozen=frozen,
        loss=_loss(parts, recipe, schedule, all_params),
        batch=made.batch,
        validation=made.validation,
        preview=preview(parts, all_params, made.samples, batches.size_of(parts, recipe.data)),
        export=partial(_export, parts, recipe),
    )


def _trained(recipe: TextToImageRecipe, model: Model) -> tuple[str, ...]:
    """Returns the components to train; raises InputError if the recipe's do not fit the model."""
    denoiser, known = model.denoiser.component, (model.denoiser.component, *model.text_encoders)
    names = (denoiser,) if recipe.train is None else recipe.train
    for name in names:
        if name not in known:
            raise InputError(f"train: {name!r} must be one of {', '.join(known)}")
    if not names:
        raise InputError("train is empty; list at least one component")
    if recipe.method in ("lora", "controlnet") and names != (denoiser,):
        raise InputError(f'train has no effect with method = "{recipe.method}"; leave it out')
    if recipe.loss.places and (recipe.method != "full" or denoiser not in names):
        raise InputError('loss.places requires method = "full" and the denoiser in train')
    if recipe.loss.places and not isinstance(model.configs[denoiser], UNetConfig | SD3Config):
        raise InputError("loss.places requires a U-Net or Stable Diffusion 3; leave it out")
    return (controlnet.COMPONENT,) if recipe.method == "controlnet" else names


def _split(
    parts: Components, recipe: TextToImageRecipe, trained: Sequence[str]
) -> tuple[Params, Params]:
    """Returns the parameters to train and the frozen ones."""
    if recipe.method == "lora":
        encoders = parts.model.text_encoders if recipe.lora.text_encoder else ()
        adapted = {name: parts.params[name] for name in (*trained, *encoders)}
        params = low_rank.init(adapted, recipe.lora.rank, jax.random.key(recipe.seed))
        if encoders and not params.keys() & set(encoders):
            raise InputError("lora.text_encoder: only CLIP's can be adapted, and there is none")
        return params, parts.params
    params = {name: parts.params[name] for name in trained}
    if recipe.loss.places:
        denoiser = parts.model.denoiser.component
        params[denoiser] = places.widened(params[denoiser], parts.model.codec.channels)
    return params, {name: tree for name, tree in parts.params.items() if name not in params}


def _all_params(recipe: TextToImageRecipe, model: Model, params: Params, frozen: Params) -> Params:
    """Returns the parameters of every component by name, as they are used and exported."""
    if recipe.method == "lora":
        return low_rank.merged(frozen, params, recipe.lora.alpha)
    if recipe.loss.places:
        denoiser = model.denoiser.component
        params = {**params, denoiser: places.narrowed(params[denoiser], model.codec.channels)}
    return {**frozen, **params}


def _export(
    parts: Components, recipe: TextToImageRecipe, params: Params, frozen: Params, directory: Path
) -> None:
    if recipe.method == "lora":
        directory.mkdir(exist_ok=True)
        low_rank.save_lora(params, recipe.lora.alpha, directory / low_rank.FILE)
    elif parts.control_config:
        weights = params[controlnet.COMPONENT]
        controlnet.save(directory, parts.control_config, weights, np.float16)
    else:
        parts.save(directory, _all_params(recipe, parts.model, params, frozen), np.float16)


def _loss(
    parts: Components, recipe: TextToImageRecipe, schedule: NoiseSchedule, all_params: Callable
) -> Callable[[Params, Params, dict, Array], tuple[Array, dict]]:
    dtype, settings = DTYPES[recipe.computing.dtype], recipe.loss
    denoiser = parts.model.denoiser
    if settings.places:
        denoiser = places.widened_denoiser(parts, recipe.computing.remat)

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        time_key, noise_key, offset_key, latent_key = jax.random.split(key, 4)
        hidden_key = jax.random.fold_in(latent_key, 1)
        networks = in_dtype(all_params(params, frozen), dtype)
        x0 = clean_latents(parts, networks, batch, latent_key)
        noise = jax.random.normal(noise_key, x0.shape)
        if settings.offset_noise:
            offset = jax.random.normal(offset_key, (len(x0), 1, 1, x0.shape[-1]))
            noise = noise + settings.offset_noise * offset
        levels = noise_levels.draw(schedule, settings, time_key, len(x0))
        x = objective.noisy(x0, noise, levels.alpha, levels.sigma)
        conditions = conditioning(parts, networks, batch, x0.shape[1:3])
        weights = networks[denoiser.component]
        if settings.places:
            weights = in_dtype(params[denoiser.component], dtype)
        # A flow network that was distilled from a guided one learns the data's own flow, which is
        # its flow at the scale 1.
        scale = jnp.ones(len(x0)) if denoiser.guidance_is_input else None
        options = {}
        if parts.control:
            options["residuals"] = parts.control.evaluate(
                networks[controlnet.COMPONENT],
                x.astype(dtype),
                levels.timesteps,
                conditions,
                batch["control"].astype(jnp.float32) / 255.0,
            )
        if denoiser.inpainting:
            x = jnp.concatenate([x, mask_channels(parts, networks, batch, hidden_key)], axis=-1)
        output, _ = denoiser.evaluate(
            weights, x.astype(dtype), levels.timesteps, conditions, scale, None, **options
        )
        output, of_places = jnp.split(output, [x0.shape[-1]], axis=-1)
        target = objective.target(x0, noise, levels.alpha, levels.sigma, schedule.prediction_type)
        errors = jnp.mean((output.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))
        counts = batch.get("weights", jnp.ones(len(x0)))
        if settings.min_snr_gamma:
            counts = counts * objective.min_snr_weight(
                levels.alpha, levels.sigma, schedule.prediction_type, settings.min_snr_gamma
            ).reshape(-1)
        total = jnp.mean(counts * errors)
        logged = {"by_noise_level": noise_levels.by_level(errors, levels.shares)}
        if settings.places:
            logged["places"] = jnp.mean(places.errors(of_places, batch["places"]))
            total += settings.places * logged["places"]
        return total, logged

    return loss


def in_dtype(params: Params, dtype) -> Params:
    """Casts parameters to the dtype of the computation."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def clean_latents(parts: Components, networks: Params, batch: dict, key: Array) -> Array:
    """Returns scaled latents, float32 [batch, h, w, c]: the batch's, or sampled from its images."""
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    return _encoded(parts, networks, to_float(batch["pixels"]), key)


def mask_channels(parts: Components, networks: Params, batch: dict, key: Array) -> Array:
    """Returns what a denoiser for inpainting takes besides latents, float32 [batch, h, w, more].

    It is made of a batch's "pixels" and "masks".
    """
    masks = batch["masks"]
    visible = jnp.where(masks[..., None], 0.0, to_float(batch["pixels"]))
    latents = _encoded(parts, networks, visible, key)
    return parts.model.denoiser.inpainting.join(masks.astype(jnp.float32), latents)


def _encoded(parts: Components, networks: Params, images: Array, key: Array) -> Array:
    """Samples scaled latents, float32 [batch, h, w, c], of images in -1..1."""
    codec = parts.model.codec
    params = networks[codec.component]
    images = images.astype(jax.tree.leaves(params)[0].dtype)
    mean, log_variance = (part.astype(jnp.float32) for part in codec.encode(params, images))
    sampled = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    return jax.lax.stop_gradient(codec.scale(sampled))


def conditioning(parts: Components, networks: Params, batch: dict, size: tuple[int, int]):
    """Returns the denoiser's conditioning for a batch's captions and the latents' size (h, w)."""
    model = parts.model
    if "context" in batch:
        text = Text(*(batch.get(name) for name in Text._fields))
    else:
        text = model.encode_text(
            {name: networks[name] for name in model.text_encoders}, batch["token_ids"], clip_skip=0
        )
    dtype = jax.tree.leaves(networks[model.denoiser.component])[0].dtype
    text = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(dtype), text)
    if not model.sizes:
        return model.condition(text, None)
    height, width = (side * model.codec.factor for side in size)
    sizes = jnp.array(model.sizes(height, width, False), jnp.float32)
    return model.condition(text, jnp.tile(sizes, (len(text.context), 1)))


def preview(
    parts: Components,
    all_params: Callable[[Params, Params], Params],
    samples: dict,
    size: int,
) -> Callable[[Params, Params], np.ndarray]:
    """Returns a function that draws a sample grid with the same examples and seeds each time.

    An image is beside what it was made from: its control image, or the part that it was given.

    Args:
      parts: the model.
      all_params: maps (trained, frozen) parameters to the parameters of every component.
      samples: as `Batches.samples`; the first ones are used.
      size: the side of the square images, in pixels.
    """
    codec, guided = parts.model.codec, parts.classifier_free
    count = min(len(samples["captions"]), batches.sample_count(size))
    captions = samples["captions"][:count]
    images = {name: samples[name][:count] for name in batches.IMAGES_IN if name in samples}
    side = size // codec.factor
    bucket = Bucket(size, size, PREVIEW_STEPS, guided, _sampler(parts))
    schedule = parts.family.schedule(parts.scheduler, bucket)
    table = samplers.sampler_table(bucket.sampler, schedule, bucket.steps)
    controls = (parts.control,) if parts.control else ()
    ranges = [
        StepRange(
            0,
            len(table.timesteps),
            guided=guided,
            clamp=schedule.clamp,
            controlled=bool(controls),
        )
    ]
    positive = parts.tokenized(captions)
    negative = parts.tokenized([""] * count, negative=True) if guided else None

    @compilation.jit
    def sample(
        params: Params, frozen: Params, noise: Array, fresh_noise: Array | None, images: dict
    ) -> Array:
        networks = all_params(params, frozen)
        conditions = (
            ids and conditioning(parts, networks, {"token_ids": ids}, (side, side))
            for ids in (positive, negative)
        )
        inputs = Inputs(
            noise,
            fresh_noise,
            *([each] for each in conditions),
            jnp.full(count, PREVIEW_GUIDANCE),
            channels=mask_channels(parts, networks, images, jax.random.key(0))
            if parts.model.denoiser.inpainting
            else None,
            controls=[(images["control"], jnp.ones(count)) for _ in controls],
        )
        pixels, _ = sample_pixels(
            [Denoising(parts.model, schedule.prediction_type, controls)],
            codec,
            jnp.float32,
            Weights(
                [networks[parts.model.denoiser.component]],
                networks[codec.component],
                [networks[controlnet.COMPONENT] for _ in controls],
            ),
            [Pass(inputs, table.initial_scale, table.columns())],
            routes=[Route(ranges)],
            decoded_at_once=1 if size > DECODED_ALONE_PX else count,
        )
        return pixels

    def picture(params: Params, frozen: Params) -> np.ndarray:
        seeds, shape = np.arange(count, dtype=np.uint32), (side, side, codec.channels)
        noise = random_noise.draw(seeds, shape, "jax", table.draws)
        pixels = np.asarray(sample(params, frozen, noise.start, noise.fresh, images))
        shown = captions
        if images:
            pixels = np.stack([_shown(images), pixels], axis=1).reshape(-1, *pixels.shape[1:])
            shown = [text for caption in captions for text in ("", caption)]
        return captioned(pixels, shown)

    return picture


def _shown(images: dict) -> np.ndarray:
    """Returns what images were made from, uint8 [count, height, width, 3]."""
    if "control" in images:
        return images["control"]
    return np.where(images["masks"][..., None], np.uint8(128), images["pixels"])


def _sampler(parts: Components) -> str:
    sampler = samplers.of_config(parts.scheduler)
    if sampler is None:
        found, known = parts.scheduler.get("_class_name"), ", ".join(samplers.OF_SCHEDULER)
        raise InputError(f"scheduler._class_name = {found!r} must be one of {known}")
    return sampler
