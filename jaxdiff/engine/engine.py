"""Generates images from requests: forms batches, compiles their programs and runs them."""

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff import checks
from jaxdiff.devices import batching, compilation, parallel
from jaxdiff.diffusion import scheduler_config
from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.engine.denoiser import LoadedDenoiser
from jaxdiff.engine.images import ImageEncoder
from jaxdiff.engine.inputs import InputMaker
from jaxdiff.engine.program import AXES, Weights, sample_pixels
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble, Steps, open_ensemble
from jaxdiff.images import loading, pasting, preprocessing
from jaxdiff.request import (
    IMAGE_FIELDS,
    OPTION_CHECKS,
    SOURCES,
    Bucket,
    Options,
    Request,
    field_checks,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# The most pixels to decode at once: an autoencoder's activations are many times as large as them.
DECODED_PX = 1024 * 1024


@dataclass(frozen=True, eq=False)
class Image:
    """A finished image.

    Attributes:
      pixels: uint8 [height, width, 3], sRGB.
      request: the request, with every default filled in.
      finite: False if the network's values overflowed, which makes the pixels meaningless.
    """

    pixels: np.ndarray
    request: Request
    finite: bool


def load(
    model: str | Path,
    *,
    variant: str | None = None,
    refiner: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    base: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] = (),
    ip_adapter: str | Path | Sequence[str | Path] = (),
    expecting: Mapping[Request, int] = MappingProxyType({}),
    **options,
) -> "TextToImage":
    """Loads a model onto this host's devices.

    Args:
      model: "shapes64", the bundled model; a directory in the diffusers layout; a single
        .safetensors file; a Hub id; or a URL such as gs://bucket/model.
      variant: which weights to load, for example "fp16", if the model has several variants.
      refiner: a second model that takes the last steps, such as Stable Diffusion XL's refiner.
      lora: one or several LoRAs, "FILE.safetensors" or "FILE.safetensors:WEIGHT", to add to the
        model's weights.
      base: for a single file that lacks text encoders or other parts, the model to take them from:
        a directory in the diffusers layout, a Hub id or a URL.
      controlnet: one or several ControlNets, "DIR" or "DIR:SCALE", that every request brings an
        image for.
      ip_adapter: one or several IP-Adapters, "FILE.safetensors" or "FILE.safetensors:SCALE", that
        every request brings an image prompt for.
      expecting: an example of each kind of request to come, with its batch size as in
        `TextToImage.generate`; their programs are compiled while the weights are read.
      **options: the fields of `Options`.

    Raises:
      InputError: if a model cannot be read, or an option is invalid.
    """
    for name, (check, *arguments) in OPTION_CHECKS.items():
        if options.get(name) is not None:
            try:
                options[name] = check(name, options[name], *arguments)
            except checks.BadValueError as problem:
                raise InputError(str(problem)) from None
    compilation.keep_programs()
    loras, nets, adapters = (
        [str(each) for each in ((said,) if isinstance(said, str | Path) else said)]
        for said in (lora, controlnet, ip_adapter)
    )
    ensemble = open_ensemble(model, variant, refiner, loras, base, nets, adapters)
    loaded = TextToImage(ensemble, Options(**options))
    for request, batch_size in expecting.items():
        loaded.compile(loaded.resolve(request), batch_size)
    try:
        loaded.load_weights()
    except BaseException:
        compilation.give_up()
        raise
    return loaded


class TextToImage:
    """A loaded model; an image depends only on its request, not on the others in its batch."""

    def __init__(self, ensemble: Ensemble, options: Options):
        """Locates the weights of the networks; `load_weights` reads them.

        Raises:
          InputError: if the weights do not match the configs, or the networks do not fit the
            options.
        """
        ensemble.check_options(options)
        preprocessing.check(options.preprocess)
        self.ensemble, self.checkpoint = ensemble, ensemble.base
        self.options = options
        self.mesh = parallel.make_mesh(options.mesh)
        dtype = DTYPES[options.dtype]
        self._schedulers = ensemble.schedulers(options.scheduler)
        steering = [
            [each.files for each in kind] for kind in (ensemble.controls, ensemble.adapters)
        ]
        self._denoisers = [  # the refiner, which is the second, is not steered
            LoadedDenoiser(checkpoint, scheduler, dtype, self.mesh, options, *more)
            for checkpoint, scheduler, more in zip(
                ensemble.checkpoints, self._schedulers, [steering, []], strict=False
            )
        ]
        self._codec = self._denoisers[-1].model.codec
        encoder = ImageEncoder(self._codec, self._denoisers[-1].codec.places, self.mesh)
        self._inputs = InputMaker(self._denoisers, self._codec, encoder, self.mesh, options.noise)
        self._programs: dict[tuple, Future[jax.stages.Compiled]] = {}
        self._steps: dict[Bucket, Steps] = {}
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
        self._sample = compilation.jit(
            # weights, inputs, initial scale, columns: only the inputs have a batch axis
            lambda *arrays, **static: parallel.over_data(
                partial(pixels, **static), self.mesh, (None, AXES, None, None)
            )(*arrays),
            static_argnames=("step_ranges", "decoded_at_once"),
        )

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

    def resolve(self, request: Request) -> Request:
        """Fills in the model's defaults for the fields of a request that are None.

        Raises:
          InputError: naming the value that is invalid or that this model does not support.
        """
        default = self.checkpoint.defaults
        width, height = default.size
        defaults = {
            "width": width,
            "height": height,
            "steps": default.steps,
            "guidance_scale": default.guidance_scale,
            "sampler": default.sampler if request.sampler is None else None,
        }
        given = {name: value for name, value in vars(request).items() if value is not None}
        values = {**defaults, **given}
        rules = field_checks(default.size_multiple, default.largest_side, tuple(SAMPLERS))
        try:
            for name, (check, *arguments) in rules.items():
                values[name] = check(name, values[name], *arguments)
            for name, field in IMAGE_FIELDS.items():
                if name in given and name not in SOURCES:
                    values[name] = field.check(name, given[name], *field.arguments)
            scheduler_config.check_steps(
                values["sampler"], values["steps"], self._schedulers, self.options.eta
            )
            return self.ensemble.with_images(Request(**values))
        except checks.BadValueError as problem:
            raise InputError(str(problem)) from None

    def prepare(self, request: Request) -> Request:
        """Resolves a request and reads its images; see `loading.prepared`.

        Raises:
          InputError: as `resolve` does, or naming the image that cannot be used.
        """
        try:
            return loading.prepared(
                self.resolve(request),
                preprocess=self.options.preprocess,
                prompt_sizes=self.prompt_sizes,
            )
        except checks.BadValueError as problem:
            raise InputError(str(problem)) from None

    def generate(self, requests: Sequence[Request], batch_size: int = 8) -> list[Image]:
        """Generates one image for each request, in the same order.

        Args:
          requests: any sizes and settings; requests with the same `Request.bucket` are batched
            together.
          batch_size: the number of images computed at once on each device of the mesh's `data`
            axis; on a CPU it is chosen by image size instead.

        Raises:
          InputError: if this model cannot fulfil a request.
        """
        resolved = [self.prepare(request) for request in requests]
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
        """Generates images of one bucket, computing one batch ahead of the caller.

        Args:
          requests: from `prepare`, with the same `Request.bucket`; consumed as needed.
          batch_size: as in `generate`; a short last batch is filled up with copies.
        """
        requests, running = iter(requests), deque()
        ahead = 1 if parallel.may_run_ahead(self.mesh) else 0
        for first in requests:
            slots = self.slots(first, batch_size)
            batch = [first, *itertools.islice(requests, slots - 1)]
            running.append((batch, self._dispatch(batch, slots)))
            if len(running) > ahead:
                yield from self._fetch(*running.popleft())
        while running:
            yield from self._fetch(*running.popleft())

    def slots(self, request: Request, batch_size: int) -> int:
        """Returns how many images like a resolved request all devices compute at once."""
        if self._on_cpu:
            batch_size = batching.on_cpu(request.width, request.height)
        return batch_size * self.mesh.shape["data"]

    def largest_batch_size(self, request: Request, most: int = batching.MOST) -> int:
        """Returns the largest batch of images like a prepared request that fits on each device.

        It is a power of two, no larger than `most` images on all devices require; on a CPU it
        depends only on the image size. The compiler's memory analysis gives candidates, which are
        then run.
        """
        if self._on_cpu:
            return batching.on_cpu(request.width, request.height)
        limit = (self._first_device.memory_stats() or {}).get("bytes_limit", sys.maxsize)
        on_each = max(1, -(-most // self.mesh.shape["data"]))
        most = min(1 << (on_each - 1).bit_length(), batching.MOST)  # the last batch is filled up
        before = dict(self._programs)

        def memory(size: int) -> int:
            program = self._program(request, self.slots(request, size))
            try:
                account = compilation.wait(self._programs, program).memory_analysis()
            except jax.errors.JaxRuntimeError as problem:
                return _without_memory(problem)
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
                return not _without_memory(problem)
            return True

        size = batching.largest(memory, limit, runs, most)
        chosen = self._program(request, self.slots(request, size))
        self._programs = before | {chosen: self._programs[chosen]}  # the others take memory
        return size

    def compile(self, request: Request, batch_size: int) -> None:
        """Starts compiling the programs for images like a resolved request; returns at once."""
        for denoiser in self._denoisers:
            denoiser.prompts.compile(request.height, request.width)
            for encoder in denoiser.image_prompts:
                encoder.compile()
        if any(self._inputs.brings(request)):
            self._inputs.encoder.compile(request.height, request.width)
        self._program(request, self.slots(request, batch_size))

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """The height and width in pixels in which each IP-Adapter sees images."""
        return tuple(encoder.adapter.size for encoder in self._denoisers[0].image_prompts)

    @property
    def _on_cpu(self) -> bool:
        return self._first_device.platform == "cpu"

    @property
    def _first_device(self) -> jax.Device:
        return self.mesh.devices.flat[0]

    def _program(self, request: Request, slots: int) -> tuple:
        """Returns the key of the program for these batches; starts compiling it if it is new.

        Seeds, prompts and guidance scales are arguments of the program, and so is the sampler's
        table: samplers with equally many rows and draws of noise share a program, unless they
        clamp estimates differently.
        """
        steps = self._steps_of(request.bucket)
        brings = self._inputs.brings(request)
        images = request.bucket.control_modes
        key = (request.width, request.height, slots, steps.ranges, steps.draws, brings, images)
        if key not in self._programs:
            self._programs[key] = compilation.ahead(
                self._sample,
                Weights(
                    [denoiser.stored.places for denoiser in self._denoisers],
                    self._denoisers[-1].codec.places,
                    [control.places for control in self._denoisers[0].controls],
                ),
                self._inputs.abstract(request, slots, steps),
                np.float32(steps.tables[0].initial_scale),
                steps.columns(),
                step_ranges=steps.ranges,
                decoded_at_once=self._decoded_at_once(request, slots),
            )
        return key

    def _dispatch(self, batch: list[Request], slots: int) -> tuple[Array, Array]:
        """Starts computing a batch; returns pixels and finiteness, which may not be ready yet."""
        batch = batch + batch[-1:] * (slots - len(batch))
        steps = self._steps_of(batch[0].bucket)
        program = self._program(batch[0], slots)
        inputs = self._inputs(batch, steps, self._weights.codec)
        return compilation.wait(self._programs, program)(
            self._weights, inputs, np.float32(steps.tables[0].initial_scale), steps.columns()
        )

    def _fetch(self, batch: list[Request], result: tuple[Array, Array]) -> Iterator[Image]:
        pixels, finite = (np.asarray(array) for array in result)
        for request, image, is_finite in zip(batch, pixels, finite, strict=False):
            if request.bucket.masked and self.options.keep_unmasked == "on":
                image = pasting.pasted(image, request.image, request.mask_image)
            yield Image(pixels=image, request=request, finite=bool(is_finite))

    def _steps_of(self, bucket: Bucket) -> Steps:
        if bucket not in self._steps:
            self._steps[bucket] = self.ensemble.steps(self.options, bucket)
        return self._steps[bucket]

    def _decoded_at_once(self, request: Request, batch_size: int) -> int:
        """Returns how many images each device decodes at once, a divisor of those it computes."""
        most = max(1, DECODED_PX // (request.width * request.height))
        on_device = batch_size // self.mesh.shape["data"]
        return max(n for n in range(1, on_device + 1) if on_device % n == 0 and n <= most)


def _without_memory(problem: jax.errors.JaxRuntimeError) -> int:
    """Returns more bytes than any device has if memory ran out; else raises the error again."""
    if "RESOURCE_EXHAUSTED" not in str(problem):
        raise problem
    return sys.maxsize
