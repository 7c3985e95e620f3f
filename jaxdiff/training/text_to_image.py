"""The denoiser's objective: a U-Net, and perhaps its text encoders, on captioned images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.checkpoint import SAMPLER_OF_SCHEDULER
from jaxdiff.devices import compilation
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion import objective, samplers
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.step_ranges import Stretch
from jaxdiff.engine.expert import Conditioning, Network
from jaxdiff.engine.program import sample_pixels, to_float
from jaxdiff.engine.prompts import XL_LAYERS_SKIPPED, encode_tokens
from jaxdiff.errors import InputError
from jaxdiff.training import batches, low_rank, noise_levels
from jaxdiff.training.components import Components, from_recipe
from jaxdiff.training.loop import Params, Task, grid
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.training.shapes import places

PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0
PREVIEW_PX = 48 * 64 * 64  # so many in a sample grid, but at least four images
DECODED_ALONE_PX = 256  # images with longer sides are decoded one after the other
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def task(
    recipe: TextToImageRecipe, output: Path, class_images: batches.ClassImages | None = None
) -> Task:
    """The objective of `recipe`, ready for `loop.fit`; what is made once goes into `output`.

    Args:
      class_images: as in `batches.prepare`.

    Raises:
      InputError: if a component or the data cannot be read, or if they do not fit.
    """
    batches.prepare(recipe, output, class_images)
    parts = from_recipe(recipe)
    schedule = NoiseSchedule.from_json(parts.scheduler, _sampler(parts))
    for name in recipe.train:
        if name not in ("unet", *parts.text_encoders):
            known = ", ".join(("unet", *parts.text_encoders))
            raise InputError(f"train: {name!r} is none of {known}")
    if parts.configs["unet"].time_cond_proj_dim is not None:
        raise InputError("the U-Net is distilled, told the guidance scale; train its teacher")
    if recipe.loss.places and (recipe.method == "lora" or "unet" not in recipe.train):
        raise InputError('loss.places: is for a whole U-Net: method = "full", and train it')
    if recipe.method == "lora":
        taught = ("unet", *(parts.text_encoders if recipe.lora.text_encoder else ()))
        taught = {name: parts.params[name] for name in taught}
        params = low_rank.init(taught, recipe.lora.rank, jax.random.key(recipe.seed))
        frozen = parts.params
    else:
        params = {name: parts.params[name] for name in recipe.train}
        if recipe.loss.places:
            params["unet"] = places.widened(params["unet"])
        frozen = {name: tree for name, tree in parts.params.items() if name not in params}
    whole = partial(_whole, recipe)
    made = batches.of(parts, recipe, output)
    return Task(
        params=params,
        frozen=frozen,
        loss=_loss(parts, recipe, schedule, whole),
        batch=made.batch,
        validation=made.validation,
        preview=preview(parts, schedule, whole, made.captions, batches.size_of(parts, recipe.data)),
        export=partial(_export, parts, recipe),
    )


def _whole(recipe: TextToImageRecipe, params: Params, frozen: Params) -> Params:
    """The parameters of every component, by name, as they are used and exported."""
    if recipe.method == "lora":
        return low_rank.merged(frozen, params, recipe.lora.alpha)
    if recipe.loss.places:
        params = {**params, "unet": places.narrowed(params["unet"])}
    return {**frozen, **params}


def _export(
    parts: Components, recipe: TextToImageRecipe, params: Params, frozen: Params, directory: Path
) -> None:
    if recipe.method == "lora":
        directory.mkdir(exist_ok=True)
        low_rank.save_lora(params, recipe.lora.alpha, directory / low_rank.FILE)
    else:
        parts.save(directory, _whole(recipe, params, frozen), np.float16)


def _loss(
    parts: Components, recipe: TextToImageRecipe, schedule: NoiseSchedule, whole: Callable
) -> Callable[[Params, Params, dict, Array], tuple[Array, dict]]:
    dtype, settings = DTYPES[recipe.computing.dtype], recipe.loss
    graph = parts.graphs["unet"]
    if settings.places:
        graph = places.widened_graph(parts.configs["unet"], recipe.computing.remat)

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        time_key, noise_key, offset_key, latent_key = jax.random.split(key, 4)
        networks = in_dtype(whole(params, frozen), dtype)
        x0 = clean_latents(parts, networks, batch, latent_key)
        noise = jax.random.normal(noise_key, x0.shape)
        if settings.offset_noise:
            offset = jax.random.normal(offset_key, (len(x0), 1, 1, x0.shape[-1]))
            noise = noise + settings.offset_noise * offset
        levels = noise_levels.draw(schedule, settings, time_key, len(x0))
        x = objective.noisy(x0, noise, levels.alpha, levels.sigma)
        told = conditioning(parts, networks, batch, x0.shape[1:3])
        unet = in_dtype(params["unet"], dtype) if settings.places else networks["unet"]
        output = _evaluate(graph, unet, x.astype(dtype), levels.timesteps, told)
        output, of_places = jnp.split(output, [x0.shape[-1]], axis=-1)
        target = objective.target(x0, noise, levels.alpha, levels.sigma, schedule.prediction_type)
        errors = jnp.mean((output.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))
        weights = batch.get("weights", jnp.ones(len(x0)))
        if settings.min_snr_gamma:
            weights = weights * objective.min_snr_weight(
                levels.alpha, levels.sigma, schedule.prediction_type, settings.min_snr_gamma
            ).reshape(-1)
        total = jnp.mean(weights * errors)
        logged = {"by_noise_level": noise_levels.by_level(errors, levels.shares)}
        if settings.places:
            logged["places"] = jnp.mean(places.errors(of_places, batch["places"]))
            total += settings.places * logged["places"]
        return total, logged

    return loss


def in_dtype(params: Params, dtype) -> Params:
    """The parameters as they are computed with."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def clean_latents(parts: Components, networks: Params, batch: dict, key: Array) -> Array:
    """The batch's scaled latents, float32 [batch, h, w, c]: given, or sampled by the encoder."""
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    pixels = to_float(batch["pixels"]).astype(jax.tree.leaves(networks["vae"])[0].dtype)
    vae = nnx.merge(parts.graphs["vae"], networks["vae"])
    mean, log_variance = (part.astype(jnp.float32) for part in vae.encode(pixels))
    sampled = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    return jax.lax.stop_gradient(parts.configs["vae"].scale(sampled))


def conditioning(
    parts: Components, networks: Params, batch: dict, size: tuple[int, int]
) -> Conditioning:
    """What the U-Net is told of the batch: of its captions, and for XL of latents' size (h, w)."""
    xl = "text_encoder_2" in parts.text_encoders
    if "context" in batch:
        context, pooled = batch["context"], batch.get("pooled")
    else:
        graphs = {name: parts.graphs[name] for name in parts.text_encoders}
        context, pooled = encode_tokens(
            graphs,
            {name: networks[name] for name in graphs},
            {name: batch["token_ids"][name][:, None] for name in graphs},
            layers_skipped=XL_LAYERS_SKIPPED * xl,
            final_norm=not xl,
            pooled=xl,
        )
    dtype = jax.tree.leaves(networks["unet"])[0].dtype
    context = context.astype(dtype)
    if not xl:
        return Conditioning(context)
    height, width = (side * parts.configs["vae"].factor for side in size)
    sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    return Conditioning(context, pooled.astype(dtype), jnp.tile(sizes, (len(context), 1)))


def _evaluate(
    graph: nnx.GraphDef, params: Params, x: Array, timesteps: Array, told: Conditioning
) -> Array:
    unet = nnx.merge(graph, params)
    return unet(x, timesteps, told.context, pooled=told.pooled, time_ids=told.time_ids)


def preview(
    parts: Components,
    schedule: NoiseSchedule,
    whole: Callable[[Params, Params], Params],
    captions: Sequence[str],
    size: int,
) -> Callable[[Params, Params], np.ndarray]:
    """The function that draws a sample grid: the same captions and seeds each time.

    Args:
      whole: (trained, frozen) to the parameters of every component.
      size: pixels, of a square image.
    """
    config = parts.configs["vae"]
    count = min(len(captions), max(4, PREVIEW_PX // size**2))
    captions = captions[:count]
    side = size // config.factor
    table = samplers.sampler_table(_sampler(parts), schedule, PREVIEW_STEPS)
    told = {
        sign: {"token_ids": {name: tokenize(texts) for name, tokenize in parts.tokenizers.items()}}
        for sign, texts in (("positive", captions), ("negative", [""] * count))
    }

    @compilation.jit
    def sample(params: Params, frozen: Params, noise: Array, fresh_noise: Array | None) -> Array:
        networks = whole(params, frozen)
        pixels, _ = sample_pixels(
            [Network(parts.graphs["unet"], schedule.prediction_type)],
            parts.graphs["vae"],
            config,
            jnp.float32,
            {"unets": [networks["unet"]], "vae": networks["vae"]},
            noise,
            fresh_noise,
            **{
                sign: [conditioning(parts, networks, batch, (side, side))]
                for sign, batch in told.items()
            },
            guidance_scale=jnp.full(count, PREVIEW_GUIDANCE),
            initial_scale=table.initial_scale,
            columns=table.columns(),
            stretches=[Stretch(expert=0, rows=len(table.timesteps), guided=True)],
            decoded_at_once=1 if size > DECODED_ALONE_PX else count,
        )
        return pixels

    def picture(params: Params, frozen: Params) -> np.ndarray:
        seeds, shape = np.arange(count, dtype=np.uint32), (side, side, config.latent_channels)
        noise, fresh_noise = random_noise.draw(seeds, shape, "jax", table.draws)
        pixels = sample(params, frozen, noise, fresh_noise)
        return grid(np.asarray(pixels), columns=min(8, count))

    return picture


def _sampler(parts: Components) -> str:
    scheduler = parts.scheduler.get("_class_name")
    if scheduler not in SAMPLER_OF_SCHEDULER:
        known = ", ".join(SAMPLER_OF_SCHEDULER)
        raise InputError(f"scheduler._class_name = {scheduler!r} must be one of {known}")
    return SAMPLER_OF_SCHEDULER[scheduler]
