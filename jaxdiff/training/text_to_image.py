"""The denoiser's objective: a U-Net, and perhaps its text encoders, on captioned images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff import compilation
from jaxdiff.checkpoint.layout import SAMPLER_OF_SCHEDULER
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion import objective, samplers
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.errors import InputError
from jaxdiff.expert import Conditioning, Network
from jaxdiff.models.unet import BETWEEN_BLOCKS
from jaxdiff.pixels import sample_pixels
from jaxdiff.prompts import XL_LAYERS_SKIPPED, encode_tokens
from jaxdiff.stretches import Stretch
from jaxdiff.training import data, dreambooth, lora, noise_levels, scenes
from jaxdiff.training.autoencoder import ENCODER, to_float
from jaxdiff.training.captions import preview_captions
from jaxdiff.training.components import Components, from_recipe
from jaxdiff.training.loop import Params, Task, grid
from jaxdiff.training.recipe import Data, TextToImageRecipe

PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0
PREVIEW_PX = 48 * 64 * 64  # so many in a sample grid, but at least four images
DECODED_ALONE_PX = 256  # images with longer sides are decoded one after the other
VALIDATION_BATCHES = 4
DROPOUT = 1  # beside the seed, so that captions are dropped by other numbers than rows are drawn
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def task(recipe: TextToImageRecipe, output: Path) -> Task:
    """The objective of `recipe`, ready for `loop.fit`; what is made once goes into `output`.

    Raises:
      InputError: if a component or the data cannot be read, or if they do not fit.
    """
    parts = from_recipe(recipe)
    schedule = NoiseSchedule.from_json(parts.scheduler, _sampler(parts))
    for name in recipe.train:
        if name not in ("unet", *parts.text_encoders):
            known = ", ".join(("unet", *parts.text_encoders))
            raise InputError(f"train: {name!r} is none of {known}")
    if recipe.method == "lora":
        taught = ("unet", *(parts.text_encoders if recipe.lora.text_encoder else ()))
        taught = {name: parts.params[name] for name in taught}
        params = lora.init(taught, recipe.lora.rank, jax.random.key(recipe.seed))
        frozen = parts.params
    else:
        params = {name: parts.params[name] for name in recipe.train}
        frozen = {name: tree for name, tree in parts.params.items() if name not in params}
    whole = partial(_whole, recipe)
    batch, validation, captions = batches(parts, recipe, output)
    return Task(
        params=params,
        frozen=frozen,
        loss=_loss(parts, recipe, schedule, whole),
        batch=batch,
        validation=validation,
        preview=preview(parts, schedule, whole, captions, size_of(parts, recipe.data)),
        export=partial(_export, parts, recipe),
    )


def _whole(recipe: TextToImageRecipe, params: Params, frozen: Params) -> Params:
    """The parameters of every component, by name."""
    if recipe.method == "lora":
        return lora.merged(frozen, params, recipe.lora.alpha)
    return {**frozen, **params}


def _export(
    parts: Components, recipe: TextToImageRecipe, params: Params, frozen: Params, directory: Path
) -> None:
    if recipe.method == "lora":
        directory.mkdir(exist_ok=True)
        lora.save_lora(params, recipe.lora.alpha, directory / lora.FILE)
    else:
        parts.save(directory, params, np.float16)


def _loss(
    parts: Components, recipe: TextToImageRecipe, schedule: NoiseSchedule, whole: Callable
) -> Callable[[Params, Params, dict, Array], tuple[Array, dict]]:
    dtype, settings = DTYPES[recipe.computing.dtype], recipe.loss
    evaluate = partial(_evaluate, parts.graphs["unet"])
    if recipe.computing.remat:  # of the activations, those between the blocks alone are kept
        between = jax.checkpoint_policies.save_only_these_names(BETWEEN_BLOCKS)
        evaluate = jax.checkpoint(evaluate, policy=between)

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
        output = evaluate(networks["unet"], x.astype(dtype), levels.timesteps, told)
        target = objective.target(x0, noise, levels.alpha, levels.sigma, schedule.prediction_type)
        errors = jnp.mean((output.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))
        weights = batch.get("weights", jnp.ones(len(x0)))
        if settings.min_snr_gamma:
            weights = weights * objective.min_snr_weight(
                levels.alpha, levels.sigma, schedule.prediction_type, settings.min_snr_gamma
            ).reshape(-1)
        by_level = noise_levels.by_level(errors, levels.shares)
        return jnp.mean(weights * errors), {"by_noise_level": by_level}

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


def batches(
    parts: Components, recipe: TextToImageRecipe, output: Path
) -> tuple[Callable[[int], dict], list[dict], list[str]]:
    """The batch of each step, batches for validation, and the captions of the sample grids."""
    if recipe.data.path == scenes.PIXELS:
        raw, held_out, captions = _of_scenes(parts, recipe, output)
    else:
        raw, held_out, captions = _of_examples(parts, recipe)
    if recipe.prior:
        raw = _with_prior(raw, parts, recipe, output)
    empty = {name: tokenize([""])[0] for name, tokenize in parts.tokenizers.items()}

    def batch(step: int, raw: Callable[[int], dict] = raw, dropout=recipe.caption_dropout) -> dict:
        made = raw(step)
        captions = made.pop("captions")
        if "context" in made:
            return made
        rng = np.random.default_rng([recipe.seed, DROPOUT, step])
        dropped = rng.random(len(captions)) < dropout
        made["token_ids"] = {
            name: np.where(dropped[:, None], empty[name], tokenize(captions))
            for name, tokenize in parts.tokenizers.items()
        }
        return made

    validation = [batch(number, held_out, 0.0) for number in range(VALIDATION_BATCHES)]
    return batch, validation if held_out is not raw else [], captions


def size_of(parts: Components, source: Data) -> int:
    """The side of the square whose area images are brought to, in pixels."""
    return source.size or parts.configs["unet"].sample_size * parts.configs["vae"].factor


def _of_scenes(parts: Components, recipe: TextToImageRecipe, output: Path) -> tuple:
    """The shapes world: functions from steps to batches, and captions."""
    vae, graph = parts.params["vae"], parts.graphs["vae"]
    config = parts.configs["vae"]

    def encode(pixels: Array) -> Array:
        return config.scale(nnx.merge(graph, vae).encode(to_float(pixels))[0])

    digest = scenes.digest_of(config, *(vae.get(name, {}) for name in ENCODER))
    latents, captions = scenes.encoded(recipe.data, recipe.seed, encode, digest, output)
    count = len(captions)
    split = max(count - VALIDATION_BATCHES * recipe.batch_size, count // 2)

    def among(first: int, stop: int) -> Callable[[int], dict]:
        def raw(step: int) -> dict:
            rng = np.random.default_rng([recipe.seed, step])
            rows = rng.integers(first, stop, size=recipe.batch_size)
            return {"latents": latents[rows], "captions": [captions[row] for row in rows]}

        return raw

    texts = captions[:48] if recipe.data.templates else preview_captions()
    return among(0, split), among(split, count), texts


def _of_examples(parts: Components, recipe: TextToImageRecipe) -> tuple:
    """The user's images: functions from steps to batches, and captions.

    The last fiftieth is held out for validation, if that is a batch at least.
    """
    examples = data.open_examples(recipe.data)
    sizes = data.buckets(
        size_of(parts, recipe.data), recipe.data.aspect_ratios, parts.size_multiple
    )
    held_out = len(examples) // 50
    held_out = held_out if held_out >= recipe.batch_size else 0
    split = len(examples) - held_out
    make = partial(
        data.batches, examples, batch_size=recipe.batch_size, seed=recipe.seed, sizes=sizes
    )
    raw = make(flip=recipe.data.flip, among=range(split))
    held = make(random_crop=False, among=range(split, len(examples))) if held_out else raw
    return raw, held, [examples.captions[i] for i in range(min(split, 48))]


def _with_prior(
    raw: Callable[[int], dict], parts: Components, recipe: TextToImageRecipe, output: Path
) -> Callable[[int], dict]:
    """Beside each batch one of as many images that the model itself made of the class."""
    made = dreambooth.class_images(recipe.model, recipe.prior, output / "prior")
    size = size_of(parts, recipe.data)
    examples = data.open_examples(Data(path=str(made)))
    prior = data.batches(
        examples, batch_size=recipe.batch_size, seed=recipe.seed, sizes=[(size, size)]
    )
    weights = np.repeat(np.float32([1.0, recipe.prior.weight]), recipe.batch_size)

    def both(step: int) -> dict:
        subject, of_class = raw(step), prior(step)
        return {
            "pixels": np.concatenate([subject["pixels"], of_class["pixels"]]),
            "captions": subject["captions"] + of_class["captions"],
            "weights": weights,
        }

    return both


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
