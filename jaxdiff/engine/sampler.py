"""Samples images: forms batches, compiles their programs and runs them."""

import itertools
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import jax
import numpy as np
from jax import Array

from jaxdiff.devices import batching, compilation, parallel, running
from jaxdiff.devices.programs import Program, wait
from jaxdiff.engine.denoiser import LoadedDenoiser
from jaxdiff.engine.image import Image
from jaxdiff.engine.images import ImageEncoder
from jaxdiff.engine.inputs import InputMaker
from jaxdiff.engine.program import AXES, SAMPLING, Inputs, Pass, Route, Weights, sample_pixels
from jaxdiff.families.ensemble import Ensemble, Steps
from jaxdiff.images import pasting
from jaxdiff.request import Bucket, Options, Request

log = logging.getLogger(__name__)

# The most pixels to decode at once: an autoencoder's activations are many times as large as them.
DECODED_PX = 1024 * 1024


class Sampler:
    """A loaded diffusion model, with all that steers it."""

    def __init__(self, ensemble: Ensemble, options: Options, dtype, mesh: jax.sharding.Mesh):
        """Locates the weights of the networks; `load_weights` reads them.

        Args:
          ensemble: the model.
          options: how it is sampled.
          dtype: of the weights and the networks' arithmetic.
          mesh: the devices.

        Raises:
          InputError: if the weights do not match the configs, or the networks do not fit the
            options.
        """
        self._ensemble, self._options, self._mesh = ensemble, options, mesh
        if options.text_encoders == "unload" and self._on_cpu:
            log.warning("--text-encoders unload saves nothing on a CPU, whose memory is the host's")
        schedulers = ensemble.schedulers(options.scheduler)
        steering = [
            [each.files for each in kind] for kind in (ensemble.controls, ensemble.adapters)
        ]
        self._denoisers = [  # the refiner, which is the second, is not steered
            LoadedDenoiser(checkpoint, scheduler, dtype, self._mesh, options, *more)
            for checkpoint, scheduler, more in zip(
                ensemble.checkpoints, schedulers, [steering, []], strict=False
            )
        ]
        self._codec = self._denoisers[-1].model.codec
        encoder = ImageEncoder(self._codec, self._denoisers[-1].codec.places, self._mesh)
        self._inputs = InputMaker(self._denoisers, self._codec, encoder, self._mesh, options.noise)
        self._programs: dict[tuple, Future[jax.stages.Compiled]] = {}
        self._passes: dict[Bucket, tuple[Steps, ...]] = {}
        pixels = partial(
            sample_pixels,
            [denoiser.denoising for denoiser in self._denoisers],
            self._codec,
            dtype,
            guidance_rescale=options.guidance_rescale,
            deep_cache=options.deep_cache,
            skipped=options.skipped_layers,
            guesses=options.guess_mode == "on",
        )
        number = 1 if ensemble.second_pass is None else 2
        self._sample = Program(pixels, mesh, (None, [AXES] * number))

    def load_weights(self) -> None:
        """Reads the weights onto the devices; after that, images can be generated."""
        for denoiser in self._denoisers:
            denoiser.prompts.load()
            for encoder in denoiser.image_prompts:
                encoder.load()
        self._weights = Weights(
            [denoiser.stored.load() for denoiser in self._denoisers],
            self._denoisers[-1].codec.load(),
            [control.load() for control in self._denoisers[0].controls],
        )

    def prompts_at_once(self, request: Request, batch_size: int) -> int:
        """Returns how many images `encode_prompts` takes; see `TextToImage.prompts_at_once`."""
        fewest = min(denoiser.prompts.at_once for denoiser in self._denoisers)
        slots = self.slots(request, batch_size)
        return max(1, fewest // slots) * slots

    def encode_prompts(self, requests: Sequence[Request]) -> None:
        """Encodes prompts ahead of their use; see `TextToImage.encode_prompts`."""
        guided = any(steps.is_guided for steps in self._passes_of(requests[0].bucket))
        for denoiser in self._denoisers:
            running.start(self._mesh, partial(denoiser.encode_prompts, requests, guided=guided))

    def stream(
        self, requests: Iterable[Request], batch_size: int, *, decodes: bool = True
    ) -> Iterator[Image]:
        """Generates images of one bucket, computing one batch ahead of the caller.

        Args:
          requests: from `prepare`, with the same `Request.bucket`; consumed as needed.
          batch_size: as in `generate`; a short last batch is filled up with copies.
          decodes: whether to decode the images; if not, their pixels are latents, float32.
        """
        requests, started = iter(requests), deque()
        ahead = 1 if parallel.may_run_ahead(self._mesh) else 0
        for first in requests:
            slots = self.slots(first, batch_size)
            batch = [first, *itertools.islice(requests, slots - 1)]
            dispatch = partial(self._dispatch, batch, slots, decodes)
            started.append((batch, running.start(self._mesh, dispatch)))
            if len(started) > ahead:
                yield from self._fetch(*started.popleft(), decodes)
        while started:
            yield from self._fetch(*started.popleft(), decodes)

    def slots(self, request: Request, batch_size: int) -> int:
        """Returns how many images like a resolved request all devices compute at once."""
        if self._on_cpu:
            batch_size = self.largest_batch_size(request)
        return batch_size * self._mesh.shape["data"]

    def largest_batch_size(self, request: Request, most: int = batching.MOST) -> int:
        """Returns the largest batch of images like a prepared request that fits on each device.

        It is a power of two, no larger than `most` images on all devices require; on a CPU it
        depends only on the image size. The compiler's memory analysis gives candidates, which are
        then run.
        """
        if self._on_cpu:
            seen = self._passes_of(request.bucket)[-1].bucket
            return batching.on_cpu(seen.width, seen.height)
        limit = (self._first_device.memory_stats() or {}).get("bytes_limit", sys.maxsize)
        most = batching.enough(most, self._mesh.shape["data"])
        before = dict(self._programs)

        def memory(size: int) -> int:
            program = self._program(request, self.slots(request, size))
            try:
                account = wait(self._programs, program).memory_analysis()
            except jax.errors.JaxRuntimeError as problem:
                return compilation.without_memory(problem)
            return (
                account.argument_size_in_bytes
                + account.output_size_in_bytes
                + account.temp_size_in_bytes
                - account.alias_size_in_bytes
            )

        def runs(size: int) -> bool:
            try:
                list(self.stream([request], size))
            except jax.errors.JaxRuntimeError as problem:
                return not compilation.without_memory(problem)
            return True

        size = batching.largest(memory, limit, runs, most)
        chosen = self._program(request, self.slots(request, size))
        self._programs = before | {chosen: self._programs[chosen]}  # the others take memory
        return size

    def prepare(self, request: Request) -> Request:
        """Returns a prepared request with its latents, if it has any, as an array.

        Raises:
          BadValueError: if they do not fit.
        """
        return self._inputs.with_latents(request)

    def programs(
        self, request: Request, batch_size: int, *, on_host: bool = True
    ) -> "Iterator[tuple[str, Future[jax.stages.Compiled]]]":
        """Starts compiling the programs for images; see `TextToImage.programs`."""
        for denoiser in self._denoisers:
            if on_host or denoiser.prompts.mesh is self._mesh:
                for program in denoiser.prompts.compile(request.height, request.width):
                    yield "prompts", program
            for encoder in denoiser.image_prompts:
                yield "image prompts", encoder.compile()
        if any(self._inputs.brings(request)) and self._ensemble.enlarges is None:
            yield "images", self._inputs.encoder.compile(request.height, request.width)
        yield SAMPLING, self._programs[self._program(request, self.slots(request, batch_size))]

    def compiled(self, request: Request, batch_size: int) -> jax.stages.Compiled:
        """Compiles the program for images like a resolved request; reads no weights.

        Raises:
          jax.errors.JaxRuntimeError: if it does not fit on the devices, or cannot be compiled.
        """
        program = self._program(request, self.slots(request, batch_size))
        return wait(self._programs, program)

    @property
    def encoder_bytes(self) -> int:
        """How much memory encoders take on each device; see `TextToImage.encoder_bytes`."""
        texts = (denoiser.prompts for denoiser in self._denoisers)
        stay = [each for each in texts if each.mesh is self._mesh and not each.unloads]
        images = (encoder for denoiser in self._denoisers for encoder in denoiser.image_prompts)
        return sum(encoder.device_bytes for encoder in (*stay, *images))

    @property
    def visiting_bytes(self) -> int:
        """How much memory encoding takes on each device; see `TextToImage.visiting_bytes`."""
        return max(denoiser.prompts.visiting_bytes() for denoiser in self._denoisers)

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """The height and width in pixels in which each IP-Adapter sees images."""
        return tuple(encoder.adapter.size for encoder in self._denoisers[0].image_prompts)

    @property
    def _on_cpu(self) -> bool:
        return self._first_device.platform == "cpu"

    @property
    def _first_device(self) -> jax.Device:
        return self._mesh.devices.flat[0]

    def _program(self, request: Request, slots: int, decodes: bool = True) -> tuple:
        """Returns the key of the program for these batches; starts compiling it if it is new.

        Seeds, prompts and guidance scales are arguments of the program, and so is the sampler's
        table: samplers with equally many rows and draws of noise share a program, unless they
        clamp estimates differently.
        """
        passes = self._passes_of(request.bucket)
        routes = tuple(Route(steps.ranges, steps.windows) for steps in passes)
        draws = tuple(steps.draws for steps in passes)
        brings, images = self._inputs.brings(request), request.bucket.control_modes
        key = (request.width, request.height, slots, routes, draws, brings, images, decodes)
        if key not in self._programs:
            self._programs[key] = self._sample.compile(
                Weights(
                    [denoiser.stored.places for denoiser in self._denoisers],
                    self._denoisers[-1].codec.places,
                    [control.places for control in self._denoisers[0].controls],
                ),
                [
                    _pass(steps, self._inputs.abstract(asked, slots, steps))
                    for asked, steps in zip(self._asked(request), passes, strict=True)
                ],
                routes=routes,
                decoded_at_once=self._decoded_at_once(request, slots),
                decodes=decodes,
            )
        return key

    def _dispatch(self, batch: list[Request], slots: int, decodes: bool) -> tuple[Array, Array]:
        """Starts computing a batch; returns pixels and finiteness, which may not be ready yet."""
        batch = batch + batch[-1:] * (slots - len(batch))
        program = self._program(batch[0], slots, decodes)
        passes = [
            _pass(steps, self._inputs(asked, steps, self._weights.codec))
            for *asked, steps in zip(
                *map(self._asked, batch), self._passes_of(batch[0].bucket), strict=True
            )
        ]
        return wait(self._programs, program)(self._weights, passes)

    def _fetch(
        self, batch: list[Request], result: tuple[Array, Array], decodes: bool
    ) -> Iterator[Image]:
        pixels, finite = (np.asarray(array) for array in result)
        for request, image, is_finite in zip(batch, pixels, finite, strict=False):
            if decodes and request.bucket.masked and self._options.keep_unmasked == "on":
                image = pasting.pasted(image, request.image, request.mask_image)
            yield Image(pixels=image, request=request, finite=bool(is_finite))

    def _passes_of(self, bucket: Bucket) -> tuple[Steps, ...]:
        if bucket not in self._passes:
            self._passes[bucket] = self._ensemble.passes(self._options, bucket)
        return self._passes[bucket]

    def _asked(self, request: Request) -> list[Request]:
        """Returns what each pass is asked for."""
        again = self._ensemble.second_pass
        return [request] if again is None else [request, again.request(request)]

    def _decoded_at_once(self, request: Request, batch_size: int) -> int:
        """Returns how many images each device decodes at once, a divisor of those it computes."""
        last = self._asked(request)[-1]
        most = max(1, DECODED_PX // (last.width * last.height))
        on_device = batch_size // self._mesh.shape["data"]
        return max(n for n in range(1, on_device + 1) if on_device % n == 0 and n <= most)


def _pass(steps: Steps, inputs: Inputs) -> Pass:
    return Pass(inputs, np.float32(steps.tables[0].initial_scale), steps.columns())
