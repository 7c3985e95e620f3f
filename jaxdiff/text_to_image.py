"""The one compiled path: sample latents, decode, round to 8 bits."""

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

from jaxdiff import checks, parallel
from jaxdiff.checkpoint.diffusers import abstract_network, load_params
from jaxdiff.checkpoint.ensemble import Ensemble, open_ensemble
from jaxdiff.checkpoint.networks import read_configs
from jaxdiff.diffusion import guidance, objective, sampling
from jaxdiff.diffusion import noise as random_noise
from jaxdiff.diffusion.solvers import SamplerTable
from jaxdiff.errors import InputError
from jaxdiff.expert import Conditioning, Expert, Network
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.request import Options, Request
from jaxdiff.stretches import Stretch, stretches_of

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# An autoencoder's activations are many times an image: so few pixels are decoded at once.
DECODED_PX = 1024 * 1024
# XLA's kernels for CPUs depend on the size of their arrays, down to the last bit. There, so many
# pixels are computed at once whatever the batch size; larger images, alone, lose no speed by it.
CPU_BATCH_PX = 8 * 64 * 64


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
    model: str | Path,
    *,
    variant: str | None = None,
    refiner: str | Path | None = None,
    **options,
) -> "TextToImage":
    """Loads a model onto this host's devices.

    Args:
      model: "shapes64", the bundled model; a directory in the diffusers layout; a single
        .safetensors file; a Hub id; or a URL such as gs://bucket/model.
      variant: "fp16" or the like, where the model has several files of the same weights.
      refiner: a second model that makes the last steps, as Stable Diffusion XL's does.
      **options: the fields of `Options`.

    Raises:
      InputError: if a model cannot be read, or an option cannot be what it is.
    """
    for name, (check, *arguments) in checks.of_options().items():
        if options.get(name) is not None:
            try:
                options[name] = check(name, options[name], *arguments)
            except checks.BadValueError as problem:
                raise InputError(str(problem)) from None
    return TextToImage(open_ensemble(model, variant, refiner), Options(**options))


class TextToImage:
    """A loaded model. An image is a function of its request, whatever it is batched with."""

    def __init__(self, ensemble: Ensemble, options: Options):
        self.ensemble, self.checkpoint = ensemble, ensemble.base
        self.options = options
        self.mesh = parallel.make_mesh(options.mesh)
        dtype = DTYPES[options.dtype]
        self._experts = [
            Expert(checkpoint, dtype, self.mesh, options) for checkpoint in ensemble.experts
        ]
        last = ensemble.experts[-1]
        vae_config = read_configs(last)["vae"]
        vae_graph, shapes = abstract_network(AutoencoderKL, vae_config)
        places = parallel.parameter_shardings(self.mesh, shapes)
        vae = load_params(shapes, last.weights("vae"), dtype, places)
        self.factor, self.channels = vae_config.factor, vae_config.latent_channels
        self._params = {"unets": [expert.params for expert in self._experts], "vae": vae}
        pixels = partial(
            sample_pixels,
            [expert.network for expert in self._experts],
            vae_graph,
            vae_config,
            dtype,
            guidance_rescale=options.guidance_rescale,
            deep_cache=options.deep_cache,
        )
        self._sample = jax.jit(
            # params, noise, fresh noise, positive, negative, guidance scale; the table is for all
            lambda *arrays, **static: parallel.over_data(
                partial(pixels, **static), self.mesh, (None, 0, 1, 0, 0, 0, None, None)
            )(*arrays),
            static_argnames=("stretches", "decoded_at_once"),
        )

    def resolve(self, request: Request) -> Request:
        """Fills in the model's own size, sampler and so on where the request leaves them open.

        Raises:
          InputError: naming the value that cannot be used or that this model cannot make.
        """
        width, height = self.checkpoint.default_size
        defaults = {
            "width": width,
            "height": height,
            "steps": self.checkpoint.default_steps,
            "guidance_scale": self.checkpoint.default_guidance_scale,
            "sampler": self.checkpoint.default_sampler if request.sampler is None else None,
        }
        said = {name: value for name, value in asdict(request).items() if value is not None}
        values = {**defaults, **said}
        rules = checks.of_request(self.checkpoint.size_multiple)
        try:
            for name, (check, *arguments) in rules.items():
                values[name] = check(name, values[name], *arguments)
            checks.steps_of(
                values["sampler"],
                values["steps"],
                [expert.scheduler for expert in self._experts],
                self.options.eta,
            )
        except checks.BadValueError as problem:
            raise InputError(str(problem)) from None
        return Request(**values)

    def generate(self, requests: Sequence[Request], batch_size: int = 8) -> list[Image]:
        """Makes one image for each request, in their order.

        Args:
          requests: of any sizes and settings; those alike enough are batched together.
          batch_size: images computed at once on each device of the mesh's `data` axis; a CPU has
            its own.

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
        requests, running, plan = iter(requests), deque(), None
        ahead = 1 if parallel.may_run_ahead(self.mesh) else 0
        for first in requests:
            plan = plan or self._tables(first)
            slots = self.slots(first, batch_size)
            batch = [first, *itertools.islice(requests, slots - 1)]
            running.append((batch, self._dispatch(batch, slots, *plan)))
            if len(running) > ahead:
                yield from _fetch(*running.popleft())
        while running:
            yield from _fetch(*running.popleft())

    def slots(self, request: Request, batch_size: int) -> int:
        """How many images like a resolved request are computed at once on all devices together."""
        if self.mesh.devices.flat[0].platform == "cpu":
            batch_size = max(1, CPU_BATCH_PX // (request.width * request.height))
        return batch_size * self.mesh.shape["data"]

    def _dispatch(
        self,
        batch: list[Request],
        batch_size: int,
        tables: list[SamplerTable],
        stretches: tuple[Stretch, ...],
    ) -> tuple[Array, Array]:
        """Starts a batch on the device; returns pixels and finiteness, perhaps not computed yet."""
        batch = batch + batch[-1:] * (batch_size - len(batch))
        first = batch[0]
        place = partial(jax.device_put, device=parallel.batch_sharding(self.mesh))
        shape = (first.height // self.factor, first.width // self.factor, self.channels)
        seeds = place(np.array([request.seed for request in batch], np.uint32))
        noise, fresh_noise = random_noise.draw(
            seeds, shape, self.options.noise, draws=max(table.draws for table in tables)
        )
        if fresh_noise is not None:
            fresh_noise = jax.device_put(fresh_noise, parallel.batch_sharding(self.mesh, axis=1))
        guided = any(stretch.guided for stretch in stretches)
        return self._sample(
            self._params,
            place(noise),
            fresh_noise,
            place([expert.conditioning(batch) for expert in self._experts]),
            place([expert.conditioning(batch, negative=True) for expert in self._experts])
            if guided
            else [None] * len(self._experts),
            place(np.array([request.guidance_scale for request in batch], np.float32)),
            np.float32(tables[0].initial_scale),
            _joined(tables, stretches),
            stretches=stretches,
            decoded_at_once=self._decoded_at_once(first, batch_size),
        )

    def _tables(self, request: Request) -> tuple[list[SamplerTable], tuple[Stretch, ...]]:
        """Each expert's table, and which expert takes which rows, guided or not."""
        base, *others = self._experts
        table = base.table(request)
        parts = stretches_of(
            table.timesteps,
            self.options,
            guided=request.bucket.guided,
            distilled=[expert.network.distilled for expert in self._experts],
            train_steps=base.train_steps,
        )
        begin = sum(part.rows for part in parts if part.expert == 0)
        return [table, *(other.table(request, begin=begin) for other in others)], parts

    def _decoded_at_once(self, request: Request, batch_size: int) -> int:
        """How many of a device's images its autoencoder decodes at once: a divisor of all."""
        most = max(1, DECODED_PX // (request.width * request.height))
        on_device = batch_size // self.mesh.shape["data"]
        return max(n for n in range(1, on_device + 1) if on_device % n == 0 and n <= most)


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
            _denoiser(
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


def _denoiser(
    network: Network,
    params: dict,
    dtype,
    positive: Conditioning,
    negative: Conditioning | None,
    guidance_scale: Array,
    guidance_rescale: float,
) -> sampling.Denoiser:
    """What `sampling.sample` takes: guided, if there is something to steer away from."""
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


def _joined(tables: Sequence[SamplerTable], stretches: Sequence[Stretch]) -> dict[str, np.ndarray]:
    """The columns of the table whose every row is its expert's."""
    expert_of_row = np.repeat([s.expert for s in stretches], [s.rows for s in stretches])
    columns = [table.columns() for table in tables]
    return {
        name: np.stack([columns[expert][name][row] for row, expert in enumerate(expert_of_row)])
        for name in columns[0]
    }


def _fetch(batch: list[Request], result: tuple[Array, Array]) -> Iterator[Image]:
    pixels, finite = (np.asarray(array) for array in result)
    for request, image, is_finite in zip(batch, pixels, finite, strict=False):
        yield Image(pixels=image, request=request, finite=bool(is_finite))
