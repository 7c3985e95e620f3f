"""The denoiser's objective: a text encoder and a U-Net, trained together on latents made once."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm
from transformers import CLIPTokenizer

from jaxdiff.checkpoint import diffusers
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion import objective, samplers
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.errors import InputError
from jaxdiff.expert import Conditioning, Network
from jaxdiff.models.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.pixels import sample_pixels
from jaxdiff.stretches import Stretch
from jaxdiff.training.autoencoder import ENCODER, PREVIEW_SEED, load_autoencoder, to_float
from jaxdiff.training.loop import Params, Task, grid
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.worlds import shapes

ENCODE_BATCH = 64
PREVIEW_SAMPLER, PREVIEW_STEPS, PREVIEW_GUIDANCE, PREVIEW_IMAGES = "ddim", 20, 3.0, 48


@dataclass(frozen=True)
class _Parts:
    """What the objective is made of, but for the weights that it trains."""

    recipe: TextToImageRecipe
    schedule: NoiseSchedule
    tokenizer: CLIPTokenizer
    text_config: CLIPTextConfig
    text_graph: nnx.GraphDef
    unet_config: UNetConfig
    unet_graph: nnx.GraphDef
    vae_config: AutoencoderKLConfig
    vae_graph: nnx.GraphDef
    vae_params: Params


def task(recipe: TextToImageRecipe, output: Path) -> Task:
    """The objective of `recipe`, ready for `loop.fit`; encodes its scenes into `output` first.

    Raises:
      InputError: if the autoencoder or the tokenizer cannot be read, or if the networks do not fit.
    """
    vae_config, vae_graph, vae_params = load_autoencoder(Path(recipe.vae))
    text_config = CLIPTextConfig.from_json(recipe.text_encoder)
    unet_config = UNetConfig.from_json(recipe.unet)
    schedule = NoiseSchedule.from_json(recipe.scheduler, PREVIEW_SAMPLER)
    _refuse_misfits(text_config, unet_config, vae_config)
    tokenizer = _load_tokenizer(Path(recipe.tokenizer))
    latents, token_ids = _encoded_scenes(
        recipe, output, vae_config, vae_graph, vae_params, tokenizer
    )
    rngs = nnx.Rngs(recipe.seed)
    text_graph, text_state = nnx.split(CLIPTextModel(text_config, rngs=rngs))
    unet_graph, unet_state = nnx.split(UNet2DConditionModel(unet_config, rngs=rngs))
    parts = _Parts(
        recipe=recipe,
        schedule=schedule,
        tokenizer=tokenizer,
        text_config=text_config,
        text_graph=text_graph,
        unet_config=unet_config,
        unet_graph=unet_graph,
        vae_config=vae_config,
        vae_graph=vae_graph,
        vae_params=vae_params,
    )
    params = {"text_encoder": text_state, "unet": unet_state}
    return Task(
        params={name: nnx.to_pure_dict(state) for name, state in params.items()},
        frozen={},
        loss=_loss(parts),
        batch=_batches(parts, latents, token_ids),
        validation=[],
        preview=_preview(parts, latents.shape[1:]),
        export=partial(_export, parts),
    )


def _batches(parts: _Parts, latents: np.ndarray, token_ids: np.ndarray) -> Callable[[int], dict]:
    recipe, empty_ids = parts.recipe, _tokenize(parts.tokenizer, [""])[0]

    def batch(step: int) -> dict:
        rng = np.random.default_rng([recipe.seed, step])
        rows = rng.integers(len(latents), size=recipe.batch_size)
        dropped = rng.random(recipe.batch_size) < recipe.caption_dropout
        return {
            "latents": latents[rows].astype(np.float32),
            "token_ids": np.where(dropped[:, None], empty_ids, token_ids[rows]).astype(np.int32),
        }

    return batch


def _loss(parts: _Parts) -> Callable[[Params, Params, dict, Array], tuple[Array, dict]]:
    schedule = parts.schedule
    alpha_bars = schedule.alpha_bars()
    alphas = np.sqrt(alpha_bars).astype(np.float32)
    sigmas = np.sqrt(1.0 - alpha_bars).astype(np.float32)

    def loss(params: Params, frozen: Params, batch: dict, key: Array) -> tuple[Array, dict]:
        time_key, noise_key = jax.random.split(key)
        x0 = batch["latents"]
        noise = jax.random.normal(noise_key, x0.shape)
        timesteps = _stratified_timesteps(time_key, len(x0), schedule.num_train_timesteps)
        alpha = jnp.asarray(alphas)[timesteps][:, None, None, None]
        sigma = jnp.asarray(sigmas)[timesteps][:, None, None, None]
        context, _ = nnx.merge(parts.text_graph, params["text_encoder"])(batch["token_ids"])
        x = objective.noisy(x0, noise, alpha, sigma)
        output = nnx.merge(parts.unet_graph, params["unet"])(x, timesteps, context)
        target = objective.target(x0, noise, alpha, sigma, schedule.prediction_type)
        return jnp.mean((output - target) ** 2), {}

    return loss


def _preview(parts: _Parts, shape: tuple[int, int, int]) -> Callable[[Params, Params], np.ndarray]:
    captions = preview_captions()
    table = samplers.sampler_table(PREVIEW_SAMPLER, parts.schedule, PREVIEW_STEPS)
    token_ids = {
        "positive": _tokenize(parts.tokenizer, captions),
        "negative": _tokenize(parts.tokenizer, [""] * len(captions)),
    }

    @jax.jit
    def sample(params: Params, noise: Array) -> Array:
        encode = nnx.merge(parts.text_graph, params["text_encoder"])
        told = {sign: [Conditioning(encode(ids)[0])] for sign, ids in token_ids.items()}
        pixels, _ = sample_pixels(
            [Network(parts.unet_graph, parts.schedule.prediction_type)],
            parts.vae_graph,
            parts.vae_config,
            jnp.float32,
            {"unets": [params["unet"]], "vae": parts.vae_params},
            noise,
            None,
            **told,
            guidance_scale=jnp.full(len(captions), PREVIEW_GUIDANCE),
            initial_scale=table.initial_scale,
            columns=table.columns(),
            stretches=[Stretch(expert=0, rows=PREVIEW_STEPS, guided=True)],
            decoded_at_once=len(captions),
        )
        return pixels

    def preview(params: Params, frozen: Params) -> np.ndarray:
        noise, _ = random_noise.draw(np.arange(len(captions), dtype=np.uint32), shape, "jax")
        return grid(np.asarray(sample(params, noise)), columns=8)

    return preview


def _export(parts: _Parts, params: Params, frozen: Params, directory: Path) -> None:
    configs = {
        "text_encoder": parts.text_config,
        "unet": parts.unet_config,
        "vae": parts.vae_config,
    }
    diffusers.save_pipeline(
        directory,
        configs=configs,
        params={**params, "vae": parts.vae_params},
        scheduler=parts.recipe.scheduler,
        tokenizer=Path(parts.recipe.tokenizer),
        dtype=np.float16,
    )


def _refuse_misfits(
    text_config: CLIPTextConfig, unet_config: UNetConfig, vae_config: AutoencoderKLConfig
) -> None:
    for ours, name, theirs in (
        (unet_config.in_channels, "vae.latent_channels", vae_config.latent_channels),
        (unet_config.out_channels, "vae.latent_channels", vae_config.latent_channels),
        (unet_config.cross_attention_dim, "text_encoder.hidden_size", text_config.hidden_size),
    ):
        if ours != theirs:
            raise InputError(
                f"the recipe's unet is made for a {name} of {ours}, but it is {theirs}"
            )


def _load_tokenizer(directory: Path) -> CLIPTokenizer:
    # Without this check transformers would look for the name on the Hub.
    if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise InputError(f"{directory} holds no tokenizer (no vocab.json, no tokenizer.json)")
    return CLIPTokenizer.from_pretrained(directory)


def preview_captions() -> list[str]:
    """The captions of the sample grids: the same at every step of every run."""
    rng = np.random.default_rng(PREVIEW_SEED)
    return [shapes.sample(rng)[1] for _ in range(PREVIEW_IMAGES)]


def _stratified_timesteps(key: Array, count: int, num_train_timesteps: int) -> Array:
    """Uniform, one in each of `count` equal parts (Kingma et al., 2021, arXiv:2107.00630, I.1)."""
    positions = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    return (positions * num_train_timesteps).astype(jnp.int32)


def _tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    """int32 [captions, the tokenizer's length]."""
    rows = tokenizer(captions, padding="max_length", truncation=True)["input_ids"]
    return np.array(rows, np.int32)


def _encoded_scenes(
    recipe: TextToImageRecipe, output: Path, config, graph, params: Params, tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Latents float16 [scenes, h, w, c], scaled, and token ids int32 [scenes, tokens].

    Rendered and encoded on the first call, read from `output` afterwards.
    """
    path = output / f"scenes-{_encoder_digest(config, params)}.npz"
    if any(other != path for other in output.glob("scenes-*.npz")):
        raise InputError(
            f"{recipe.vae} is not the autoencoder that {output} was begun with; name "
            "another --output"
        )
    if not path.exists():
        latents, captions = _encode_scenes(recipe, config, graph, params)
        token_ids = np.concatenate(
            [_tokenize(tokenizer, captions[i : i + 4096]) for i in range(0, len(captions), 4096)]
        )
        unfinished = output / "scenes.unfinished.npz"
        np.savez(unfinished, latents=latents, token_ids=token_ids)
        os.replace(unfinished, path)
    with np.load(path, allow_pickle=False) as scenes:
        return scenes["latents"], scenes["token_ids"]


def _encode_scenes(
    recipe: TextToImageRecipe, config: AutoencoderKLConfig, graph: nnx.GraphDef, params: Params
) -> tuple[np.ndarray, list[str]]:
    """Renders the recipe's scenes; returns their latents and captions."""

    @jax.jit
    def encode(params: Params, pixels: Array) -> Array:
        mean, _ = nnx.merge(graph, params).encode(to_float(pixels))
        return config.scale(mean).astype(jnp.float16)

    latents, captions = [], []
    for start in tqdm(range(0, recipe.data.scenes, ENCODE_BATCH), desc="encoding scenes"):
        rng = np.random.default_rng([recipe.seed, start])
        scenes, texts = zip(*(shapes.sample(rng) for _ in range(ENCODE_BATCH)), strict=True)
        latents.append(np.asarray(encode(params, np.stack(list(map(shapes.render, scenes))))))
        captions += texts
    return np.concatenate(latents), captions


def _encoder_digest(config: AutoencoderKLConfig, params: Params) -> str:
    """Of all that the latents depend on; the decoder may be trained further."""
    digest = hashlib.sha256(repr(config).encode())
    for name in ENCODER:
        for leaf in jax.tree.leaves(params.get(name, {})):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
