"""Generates images from requests."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import checks
from jaxdiff.devices import batching, compilation, parallel, programs
from jaxdiff.diffusion import scheduler_config
from jaxdiff.engine import mixture, prompted
from jaxdiff.engine.image import Image
from jaxdiff.engine.sampler import Sampler
from jaxdiff.engine.upscaler import Upscaler
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.families.opening import open_ensemble
from jaxdiff.images import loading, preprocessing
from jaxdiff.request import OPTION_CHECKS, Options, Request, derived_seed, field_checks

LOOK_AHEAD = 8  # batches; how far `stream` reads ahead to fill them
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load(
    model: str | Path,
    *,
    variant: str | None = None,
    refiner: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    base: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] = (),
    ip_adapter: str | Path | Sequence[str | Path] = (),
    upscale: str | Path | None = None,
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
      upscale: an upscaler that enlarges every image, "MODEL" or "MODEL:FACTOR".
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
    ensemble = open_ensemble(model, variant, refiner, loras, base, nets, adapters, upscale)
    loaded = TextToImage(ensemble, Options(**options))
    for request, batch_size in expecting.items():
        loaded.compile(loaded.resolve(request), batch_size)
    try:
        loaded.load_weights()
    except BaseException:
        programs.give_up()
        raise
    return loaded


class TextToImage:
    """A loaded model; an image depends only on its request, not on the others in its batch."""

    def __init__(
        self,
        ensemble: Ensemble,
        options: Options,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Locates the weights of the networks; `load_weights` reads them.

        Args:
          ensemble: the model.
          options: how it is sampled.
          devices: as in `parallel.make_mesh`.

        Raises:
          InputError: if the weights do not match the configs, or the networks do not fit the
            options.
        """
        ensemble.check_options(options)
        preprocessing.check(options.preprocess)
        self.ensemble, self.checkpoint = ensemble, ensemble.base
        self.options = options
        self.mesh = parallel.make_mesh(options.mesh, devices)
        dtype = DTYPES[options.dtype]
        self._sampler = self._upscaler = None
        if ensemble.samples:
            self._sampler = Sampler(ensemble, options, dtype, self.mesh)
        if ensemble.upscaler is not None:
            self._upscaler = Upscaler(*ensemble.upscaler, dtype, self.mesh)

    def load_weights(self) -> None:
        """Reads the weights onto the devices; after that, images can be generated."""
        for part in filter(None, (self._sampler, self._upscaler)):
            part.load_weights()

    def resolve(self, request: Request) -> Request:
        """Fills in the model's defaults for the fields of a request that are None.

        Raises:
          InputError: naming the value that is invalid or that this model does not support.
        """
        default = self.checkpoint.defaults
        width, height = default.size
        defaults = {
            "seed": derived_seed(prompted.JOB_SEED, "0", 0),
            "width": width,
            "height": height,
            "steps": default.steps,
            "guidance_scale": default.guidance_scale,
            "sampler": default.sampler if request.sampler is None else None,
        }
        given = {name: value for name, value in vars(request).items() if value is not None}
        values = {**defaults, **given}
        rules = field_checks(default.size_multiple, default.largest_side, self.ensemble.samplers)
        try:
            for name, (check, *arguments) in rules.items():
                values[name] = check(name, values[name], *arguments)
            scheduler_config.check_steps(
                values["sampler"],
                values["steps"],
                self.ensemble.schedulers(self.options.scheduler),
                self.options.eta,
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
            if self.ensemble.enlarges is not None:
                multiple = self.checkpoint.defaults.size_multiple
                request = loading.sized(request, self.enlarges, multiple)
            prepared = loading.prepared(
                self.resolve(request),
                preprocess=self.options.preprocess,
                prompt_sizes=self.prompt_sizes,
                enlarges=self.enlarges,
            )
            return prepared if self._sampler is None else self._sampler.prepare(prepared)
        except checks.BadValueError as problem:
            raise InputError(str(problem)) from None

    def generate(
        self,
        prompts: str | Request | Iterable[str | Request],
        batch_size: int = 8,
        *,
        num_images: int = 1,
        seeds: Sequence[int] | None = None,
        latents: np.ndarray | Sequence[np.ndarray] | None = None,
        output: Literal["images", "latents"] = "images",
        progress: Callable[[int, int], object] | None = None,
        **settings,
    ) -> list[Image] | list[np.ndarray]:
        """Generates images: `num_images` of the first prompt, then of the next, and so on.

        Prompts without a seed get those that `jaxdiff generate` derives for a manifest of the same
        rows, so equal prompts give different images, and equal calls equal ones.

        Args:
          prompts: texts or requests, of any sizes and settings; those of the same `Request.bucket`
            are computed together.
          batch_size: the number of images computed at once on each device of the mesh's `data`
            axis; on a CPU it is chosen by image size instead.
          num_images: images per prompt.
          seeds: one for each image of the result, in place of all others.
          latents: the noise to begin with, for each image of the result: see `Request.latents`.
          output: "latents" returns what would be decoded, scaled as the denoiser sees it: for each
            image float32 [h, w, channels].
          progress: called with the number of finished images and of all images.
          **settings: fields of `Request`, for prompts that leave them open: `steps=20`. With
            `seed=7`, the images of each prompt have the seeds 7, 8 and so on.

        Raises:
          InputError: if this model cannot fulfil a request; then no image is generated.
        """
        if output not in ("images", "latents"):
            raise InputError(f"output must be images or latents, not {checks.shown(output)}")
        if output == "latents" and (self._sampler is None or self._upscaler is not None):
            raise InputError("output must be images: an upscaler makes no latents")
        requests = [*prompted.requests(prompts, num_images, settings)]
        if seeds is not None:
            requests = prompted.each(requests, "seed", "seeds", seeds)
        if latents is not None:
            requests = prompted.each(requests, "latents", "latents", latents)
        prepared = [self.prepare(request) for request in requests]
        decodes, total = output == "images", len(prepared)
        images = mixture.in_order(
            prepared,
            lambda some: self._stream_in_parts(some, batch_size, decodes=decodes),
            look_ahead=total,
            finished=lambda done: progress and progress(done, total),
        )
        return [image if decodes else image.pixels for image in images]

    def stream(
        self,
        prompts: Iterable[str | Request],
        batch_size: int = 8,
        *,
        num_images: int = 1,
        **settings,
    ) -> Iterator[Image]:
        """Generates images as `generate` does, one after the other, for any number of prompts.

        It keeps no more than a few batches of images: if sizes or settings vary, it reads prompts
        ahead to fill batches, and yields the images in the order of the prompts.

        Args:
          prompts: consumed as needed; they may never end.
          batch_size, num_images, **settings: as in `generate`.

        Raises:
          InputError: when it reads a request that this model cannot fulfil.
        """
        requests = prompted.requests(prompts, num_images, settings)
        return mixture.in_order(
            map(self.prepare, requests),
            lambda some: self._stream_in_parts(some, batch_size),
            look_ahead=LOOK_AHEAD * batch_size * self.mesh.shape["data"],
        )

    def _stream_in_parts(
        self, requests: Iterator[Request], batch_size: int, *, decodes: bool = True
    ) -> Iterator[Image]:
        """Generates images as `stream_bucket` does; encodes prompts ahead if that is wanted."""
        if not self.encodes_ahead:
            yield from self.stream_bucket(requests, batch_size, decodes=decodes)
            return
        for first in requests:
            most = self.prompts_at_once(first, batch_size)
            part = [first, *itertools.islice(requests, most - 1)]
            self.encode_prompts(part)
            yield from self.stream_bucket(part, batch_size, decodes=decodes)

    @property
    def encodes_ahead(self) -> bool:
        """Whether `encode_prompts` is to be called before `stream_bucket`.

        Text encoders are unloaded then. Without the call, `stream_bucket` brings them back to the
        devices for each batch with new prompts, while the batch before is still computed.
        """
        return self.options.text_encoders == "unload"

    def prompts_at_once(self, request: Request, batch_size: int) -> int:
        """Returns for how many images like a resolved request `encode_prompts` keeps the prompts.

        They are full batches.
        """
        return self._sampler.prompts_at_once(request, batch_size)

    def encode_prompts(self, requests: Sequence[Request]) -> None:
        """Encodes the prompts of images that `stream_bucket` will make.

        Args:
          requests: resolved ones of one bucket, at most as many as `prompts_at_once` says.
        """
        self._sampler.encode_prompts(requests)

    def stream_bucket(
        self, requests: Iterable[Request], batch_size: int, *, decodes: bool = True
    ) -> Iterator[Image]:
        """Generates images of one bucket, computing one batch ahead of the caller.

        Args:
          requests: from `prepare`, with the same `Request.bucket`; consumed as needed.
          batch_size: as in `generate`; a short last batch is filled up with copies.
          decodes: whether to decode the images; if not, their pixels are latents, float32.
        """
        if self._sampler is None:
            images = (Image(request.image, request, finite=True) for request in requests)
        else:
            images = self._sampler.stream(requests, batch_size, decodes=decodes)
        return images if self._upscaler is None else self._upscaler.stream(images)

    def slots(self, request: Request, batch_size: int) -> int:
        """Returns how many images like a resolved request all devices compute at once."""
        if self._sampler is None:
            return self._upscaler.images_at_once(*self._seen(request))
        return self._sampler.slots(request, batch_size)

    def largest_batch_size(self, request: Request, most: int = batching.MOST) -> int:
        """Returns the largest batch of images like a prepared request that fits on each device.

        See `Sampler.largest_batch_size`. An upscaler has its own batches, of tiles.
        """
        return 1 if self._sampler is None else self._sampler.largest_batch_size(request, most)

    def compile(self, request: Request, batch_size: int) -> None:
        """Starts compiling the programs for images like a resolved request; returns at once."""
        for _ in self.programs(request, batch_size):
            pass

    def programs(
        self, request: Request, batch_size: int, *, on_host: bool = True
    ) -> "Iterator[tuple[str, Future[jax.stages.Compiled]]]":
        """Starts compiling the programs for images like a resolved request, one after the other.

        Args:
          on_host: whether to compile those of text encoders on the host, too.

        Yields:
          what a program is for, and the program; those of several kinds of images may share some.
        """
        if self._sampler is not None:
            yield from self._sampler.programs(request, batch_size, on_host=on_host)
        if self._upscaler is not None:
            yield "upscaling", self._upscaler.compile(*self._seen(request))

    def compiled(self, request: Request, batch_size: int) -> jax.stages.Compiled:
        """Compiles the program for images like a resolved request; reads no weights.

        Raises:
          jax.errors.JaxRuntimeError: if it does not fit on the devices, or cannot be compiled.
        """
        return self._sampler.compiled(request, batch_size)

    @property
    def encoder_bytes(self) -> int:
        """How much memory the weights of text and image encoders take on each device all the time.

        Those of text encoders that are unloaded are not counted.
        """
        return self._sampler.encoder_bytes

    @property
    def visiting_bytes(self) -> int:
        """How much memory unloaded text encoders take on each device while they encode.

        Their temporaries are counted; the program for images has none then. Their programs are
        compiled; no weights are read. 0 if none are unloaded.

        Raises:
          jax.errors.JaxRuntimeError: if they do not fit, or cannot be compiled.
        """
        return self._sampler.visiting_bytes

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """The height and width in pixels in which each IP-Adapter sees images."""
        return () if self._sampler is None else self._sampler.prompt_sizes

    @property
    def enlarges(self) -> int:
        """By how much the model enlarges the image of a request; 1 if it does not."""
        return self.ensemble.enlarges or 1

    def _seen(self, request: Request) -> tuple[int, int]:
        """Returns the height and width in pixels of what the upscaler sees."""
        if self._sampler is None:
            return request.height // self.enlarges, request.width // self.enlarges
        return request.height, request.width
