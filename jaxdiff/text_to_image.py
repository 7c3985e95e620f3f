"""The one compiled path: encode text, sample latents, decode, round to 8 bits."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from transformers import CLIPTokenizer

from jaxdiff import checks, parallel
from jaxdiff.checkpoint.diffusers import abstract_network, load_params
from jaxdiff.checkpoint.layout import Checkpoint, open_checkpoint
from jaxdiff.diffusion import guidance, objective, samplers
from jaxdiff.diffusion import noise as starting_noise
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.errors import InputError
from jaxdiff.models.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.request import Request

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Text is encoded in batches of this size whatever the size of the image batches, so that a prompt's
# embedding never depends on it.
TEXT_BATCH = 8
REMEMBERED_PROMPTS = 1024
# What diffusers' StableDiffusionPipeline makes of any scheduler's config that it is given.
PIPELINE_SCHEDULE = {"steps_offset": 1, "clip_sample": False}


@dataclass(frozen=True, eq=False)
class Image:
    """A finished image.

    Attributes:
      pixels: uint8 [height, width, 3], sRGB.
      request: what was asked for, with every default filled in.
      finite: False if the network's values overflowed; the pixels then mean nothing.
    """

    pixels: np.ndarray
    request: Request
    finite: bool


def load(
    model: str | Path, *, dtype: str = "float32", noise: str = "jax", mesh: str | None = None
) -> "TextToImage":
    """Loads a model onto this host's devices.

    Args:
      model: "shapes64", the bundled model, or a directory in the diffusers layout.
      dtype: "float32" or "bfloat16", of the weights and of the networks' arithmetic.
      noise: "jax", or "torch" for the starting noise that PyTorch's CPU generator draws.
      mesh: such as "data=4,model=2"; by default every device takes its part of each batch.

    Raises:
      InputError: if the model cannot be read, or an argument is not one of the above.
    """
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("noise", noise, starting_noise.KINDS),
    ):
        if value not in known:
            raise InputError(f"{name} = {value!r}: it must be one of {', '.join(known)}")
    return TextToImage(open_checkpoint(model), DTYPES[dtype], noise, parallel.make_mesh(mesh))


class TextToImage:
    """A loaded model. An image is a function of its request, whatever it is batched with."""

    def __init__(self, checkpoint: Checkpoint, dtype, noise: str, mesh: jax.sharding.Mesh):
        self.checkpoint = checkpoint
        self.noise = noise
        self.mesh = mesh
        self.schedule = NoiseSchedule.from_json(
            {**checkpoint.config("scheduler"), **PIPELINE_SCHEDULE}
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint.path / "tokenizer")
        text_config = CLIPTextConfig.from_json(checkpoint.config("text_encoder"))
        self.tokens = min(self.tokenizer.model_max_length, text_config.max_position_embeddings)
        unet_config = UNetConfig.from_json(checkpoint.config("unet"))
        vae_config = AutoencoderKLConfig.from_json(checkpoint.config("vae"))
        self.factor, self.channels = vae_config.factor, unet_config.in_channels
        self.params = {}
        graphs = {}
        for component, network, config in (
            ("text_encoder", CLIPTextModel, text_config),
            ("unet", UNet2DConditionModel, unet_config),
            ("vae", AutoencoderKL, vae_config),
        ):
            graphs[component], shapes = abstract_network(network, config)
            self.params[component] = load_params(
                shapes,
                checkpoint.weights(component),
                dtype,
                parallel.parameter_shardings(mesh, shapes),
            )
        self._encode = jax.jit(
            lambda params, token_ids: nnx.merge(graphs["text_encoder"], params)(token_ids)
        )
        prediction_type = self.schedule.prediction_type
        self._sample = jax.jit(
            partial(sample_pixels, graphs, vae_config, prediction_type, dtype),
            static_argnames="guided",
        )
        self._embeddings: dict[str, Array] = {}

    def resolve(self, request: Request) -> Request:
        """Fills in the model's own size and sampler where the request leaves them open.

        Raises:
          InputError: naming the value that cannot be used or that this model cannot make.
        """
        width, height = self.checkpoint.default_size
        values = {
            **asdict(request),
            "width": width if request.width is None else request.width,
            "height": height if request.height is None else request.height,
            "sampler": request.sampler or self.checkpoint.default_sampler,
        }
        rules = checks.of_request(self.checkpoint.size_multiple, self.checkpoint.max_steps)
        for name, (check, *arguments) in rules.items():
            try:
                values[name] = check(name, values[name], *arguments)
            except checks.BadValueError as problem:
                raise InputError(str(problem)) from None
        return Request(**values)

    def generate(self, requests: Sequence[Request], batch_size: int = 8) -> list[Image]:
        """Makes one image for each request, in their order.

        Args:
          requests: of any sizes and settings; those alike enough are batched together.
          batch_size: images computed at once on each device of the mesh's `data` axis.

        Raises:
          InputError: if a request cannot be made by this model.
        """
        resolved = [self.resolve(request) for request in requests]
        buckets: dict[tuple, list[int]] = {}
        for index, request in enumerate(resolved):
            buckets.setdefault(request.bucket, []).append(index)
        images: list[Image] = [None] * len(resolved)
        for indices in buckets.values():
            stream = self.stream([resolved[index] for index in indices], batch_size)
            for index, image in zip(indices, stream, strict=True):
                images[index] = image
        return images

    def stream(self, requests: Iterable[Request], batch_size: int) -> Iterator[Image]:
        """Makes images of one bucket, one batch ahead of what the caller has taken.

        Args:
          requests: resolved, all with the same `Request.bucket`; taken as they are needed.
          batch_size: as in `generate`; a last short batch is filled with copies.
        """
        batch_size *= self.mesh.shape["data"]
        requests, running = iter(requests), deque()
        ahead = 1 if parallel.may_run_ahead(self.mesh) else 0
        while batch := list(itertools.islice(requests, batch_size)):
            running.append((batch, self._dispatch(batch, batch_size)))
            if len(running) > ahead:
                yield from _fetch(*running.popleft())
        while running:
            yield from _fetch(*running.popleft())

    def _dispatch(self, batch: list[Request], batch_size: int) -> tuple[Array, Array]:
        """Starts a batch on the device; returns pixels and finiteness, perhaps not computed yet."""
        batch = batch + batch[-1:] * (batch_size - len(batch))
        first = batch[0]
        guided = first.bucket.guided
        embeddings = self._embed(
            [r.prompt for r in batch] + [r.negative_prompt for r in batch if guided]
        )
        table = samplers.sampler_table(first.sampler, self.schedule, first.steps)
        shape = (first.height // self.factor, first.width // self.factor, self.channels)
        place = partial(jax.device_put, device=parallel.batch_sharding(self.mesh))
        seeds = np.array([r.seed for r in batch], np.uint32)
        return self._sample(
            self.params,
            place(starting_noise.draw(place(seeds), shape, self.noise)),
            place(jnp.stack([embeddings[r.prompt] for r in batch])),
            place(jnp.stack([embeddings[r.negative_prompt] for r in batch])) if guided else None,
            place(np.array([r.guidance_scale for r in batch], np.float32)),
            np.float32(table.initial_scale),
            table.columns(),
            guided=guided,
        )

    def _embed(self, prompts: list[str]) -> dict[str, Array]:
        """The embedding of each prompt, [tokens, width]; those met lately are remembered."""
        found = {p: self._embeddings.pop(p) for p in set(prompts) if p in self._embeddings}
        new = sorted(set(prompts) - found.keys())
        for start in range(0, len(new), TEXT_BATCH):
            texts = new[start : start + TEXT_BATCH]
            padded = texts + [""] * (TEXT_BATCH - len(texts))
            token_ids = self.tokenizer(
                padded, padding="max_length", truncation=True, max_length=self.tokens
            )["input_ids"]
            encoded = self._encode(self.params["text_encoder"], np.array(token_ids, np.int32))
            if not parallel.may_run_ahead(self.mesh):
                jax.block_until_ready(encoded)
            found |= zip(texts, encoded, strict=False)
        self._embeddings |= found  # the newest last
        while len(self._embeddings) > REMEMBERED_PROMPTS:
            del self._embeddings[next(iter(self._embeddings))]
        return found


def sample_pixels(
    graphs: dict[str, nnx.GraphDef],
    vae_config: AutoencoderKLConfig,
    prediction_type: str,
    dtype,
    params: dict,
    noise: Array,
    context: Array,
    negative_context: Array | None,
    guidance_scale: Array,
    initial_scale: Array,
    columns: dict[str, Array],
    *,
    guided: bool,
) -> tuple[Array, Array]:
    """The pure function from noise to pixels, for `jax.jit`.

    Args:
      graphs, params: of "unet" and "vae".
      vae_config: for the latents' scale, besides.
      prediction_type: as in `objective.to_x0`.
      dtype: of the networks' arithmetic; the sampler's own is float32.
      noise: float32 [batch, h, w, latent channels].
      context, negative_context: [batch, tokens, width]; the latter only if `guided`.
      guidance_scale: [batch].
      initial_scale, columns: of a `SamplerTable`.
      guided: whether to apply guidance at all.

    Returns:
      pixels uint8 [batch, h * factor, w * factor, 3], and whether each image was finite, [batch].
    """
    unet = nnx.merge(graphs["unet"], params["unet"])
    vae = nnx.merge(graphs["vae"], params["vae"])
    if guided:
        context = guidance.paired(negative_context, context)

    def denoise(x: Array, timestep: Array, alpha: Array, sigma: Array) -> Array:
        latents = (guidance.paired(x, x) if guided else x).astype(dtype)
        timesteps = jnp.full(latents.shape[0], timestep)
        output = unet(latents, timesteps, context).astype(jnp.float32)
        if guided:
            output = guidance.guide(output, guidance_scale)
        return objective.to_x0(output, x, alpha, sigma, prediction_type)

    latents = samplers.sample(denoise, noise, initial_scale, columns)
    images = vae.decode(vae_config.unscale(latents).astype(dtype)).astype(jnp.float32)
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    return to_pixels(images), finite


def to_pixels(images: Array) -> Array:
    """Images in -1..1 to uint8, rounded to the nearest."""
    return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _fetch(batch: list[Request], result: tuple[Array, Array]) -> Iterator[Image]:
    pixels, finite = (np.asarray(array) for array in result)
    for request, image, is_finite in zip(batch, pixels, finite, strict=False):
        yield Image(pixels=image, request=request, finite=bool(is_finite))
