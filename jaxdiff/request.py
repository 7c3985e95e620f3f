"""The request for one image, and the options that all images of a run share. Imports no JAX."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple

from jaxdiff import checks
from jaxdiff.errors import InputError

NOT_SAMPLED = "none"  # the sampler of a request whose image is enlarged by a GAN upscaler


class Bucket(NamedTuple):
    """What all images of a batch share: it determines the compiled program and its tables.

    Prompts, seeds and guidance scales may differ within a batch.
    """

    width: int
    height: int
    steps: int
    guided: bool
    sampler: str
    strength: float | None = None  # None without an image to begin with
    masked: bool = False
    control: tuple[float, float] | None = None  # when control begins and ends; None without images
    control_modes: int = 0  # the number of images that union ControlNets see


class Source(NamedTuple):
    """An image that a row names.

    Attributes:
      address: a path below the folder of images, or a URL.
      sha256: of its bytes (hex), when the row was planned.
    """

    address: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for one image. `None` selects the model's default.

    Numbers and texts are checked at once, as far as that is possible without the model; an
    `InputError` names the field.

    Attributes:
      prompt: describes the image.
      negative_prompt: what classifier-free guidance steers away from.
      seed: 0 to 2**32 - 1; with the same model and settings, it determines every pixel. `None`
        derives one from the place of the request, as `derived_seed` does.
      width, height: pixels, multiples of the autoencoder's factor (8 for Stable Diffusion).
      steps: sampling steps, at least 1.
      guidance_scale: w in uncond + w (cond - uncond); guidance is off at 1 and below.
      sampler: one of `samplers.SAMPLERS`; `None` selects the one in the model's scheduler.
      image: another image to begin with: a path, a PIL image, uint8 [h, w, 3] or a `Source`. Its
        largest part with the aspect ratio of `width` and `height` is resized to them.
      strength: the share of the steps that are taken from there, 0 to 1 (Meng et al., 2022,
        arXiv:2108.01073); only with an image.
      mask_image: which part of the image is painted anew: white. As `image`, but grey, or bool
        [h, w].
      outpaint: the width in pixels of what is painted on the left, top, right and bottom of the
        image, which takes the rest of `width` and `height`.
      image_guidance_scale: how closely a model that is guided by `image`, too, follows it (Brooks
        et al., 2023, arXiv:2211.09800, equation 3); below 1, all guidance is off, as in diffusers.
      control_image: what the model's ControlNets see, an image for each, in any form of `image`;
        for one net, or for a model that sees it itself, it need not be in a list. A union
        ControlNet that is the only net sees all of them.
      controlnet_conditioning_scale: how strongly each of them steers, or one number for all.
      control_mode: for union ControlNets, of which kind each control image is: its number in the
        net, from 0.
      control_guidance_start, control_guidance_end: the part of the steps in which they steer, as
        fractions from 0 to 1.
      ip_adapter_image: an image prompt for each of the model's IP-Adapters, in any form of `image`;
        for one adapter, it need not be in a list. Its middle square is seen.
      ip_adapter_scale: how much each of them counts, or one number for all.
      latents: the noise to begin with in place of the seed's, of variance 1, float32 [h, w,
        channels], in the size of the latents; only in Python.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    image: Any = None
    strength: float | None = None
    mask_image: Any = None
    outpaint: tuple[int, int, int, int] | None = None
    image_guidance_scale: float | None = None
    control_image: Any = None
    controlnet_conditioning_scale: float | tuple[float, ...] | None = None
    control_guidance_start: float | None = None
    control_guidance_end: float | None = None
    control_mode: int | tuple[int, ...] | None = None
    ip_adapter_image: Any = None
    ip_adapter_scale: float | tuple[float, ...] | None = None
    latents: Any = None

    def __post_init__(self):
        for name, (check, *arguments) in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                try:
                    object.__setattr__(self, name, check(name, value, *arguments))
                except checks.BadValueError as problem:
                    raise InputError(str(problem)) from None

    @classmethod
    def of_checked(cls, values: dict[str, Any]) -> "Request":
        """Makes a request without checking its values again: planning makes millions.

        Args:
          values: of all fields, in their order, as the checks of `field_checks` and `IMAGE_FIELDS`
            return them. The request keeps the dictionary.
        """
        made = object.__new__(cls)
        object.__setattr__(made, "__dict__", values)
        return made

    def __repr__(self) -> str:
        said = (f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"Request({', '.join(said)})"

    @property
    def has_images(self) -> bool:
        """Whether any of `IMAGE_FIELDS` has a value."""
        return {*map(type, _of_images(self))} != {type(None)}  # arrays have no plain ==

    @property
    def bucket(self) -> Bucket:
        """The bucket of this image, whose fields must all be resolved."""
        size, guided = (self.width, self.height), self.guidance_scale > 1
        if not self.has_images:
            return Bucket(*size, self.steps, guided, self.sampler)
        masked = self.mask_image is not None or self.outpaint is not None
        control = self.control_guidance_start, self.control_guidance_end
        control = None if self.control_image is None else control
        if self.image_guidance_scale is not None:
            guided = guided and self.image_guidance_scale >= 1
        control_modes = len(self.control_mode or ())
        of_images = self.strength, masked, control, control_modes
        return Bucket(*size, self.steps, guided, self.sampler, *of_images)


class Field(NamedTuple):
    """How a field of `Request` is checked and stored.

    Attributes:
      check: a function of `checks`.
      arguments: the check's arguments that do not depend on the model.
      column: the Arrow name of its column type in Parquet.
    """

    check: Callable
    arguments: tuple
    column: str


# All fields of a request, in the order in which they are written.
FIELDS = {
    "prompt": Field(checks.text, (), "string"),
    "negative_prompt": Field(checks.text, (), "string"),
    "seed": Field(checks.integer, (0, checks.MAX_SEED), "int64"),
    "width": Field(checks.side, (), "int32"),
    "height": Field(checks.side, (), "int32"),
    "steps": Field(checks.integer, (1, checks.MAX_STEPS), "int32"),
    "guidance_scale": Field(checks.number, (0, checks.MAX_GUIDANCE_SCALE), "float64"),
    "sampler": Field(checks.choice, (), "string"),
}


def _column(name: str) -> str:
    """Returns the column of a field: the image to begin with is not called "image" in datasets.

    The Hub gives that name to the finished image.
    """
    return "init_image" if name == "image" else name


# The fields of a request that brings images, in the same form.
IMAGE_FIELDS = {
    "image": Field(checks.text, (), "string"),
    "strength": Field(checks.number, (0, 1), "float64"),
    "mask_image": Field(checks.text, (), "string"),
    "outpaint": Field(checks.margins, (), "string"),
    "image_guidance_scale": Field(checks.number, (0, checks.MAX_GUIDANCE_SCALE), "float64"),
    "control_image": Field(checks.texts, (), "string"),
    "controlnet_conditioning_scale": Field(checks.numbers_in, (0, 10), "string"),
    "control_guidance_start": Field(checks.number, (0, 1), "float64"),
    "control_guidance_end": Field(checks.number, (0, 1), "float64"),
    "control_mode": Field(checks.integers_in, (0, checks.MAX_CONTROL_MODE), "string"),
    "ip_adapter_image": Field(checks.texts, (), "string"),
    "ip_adapter_scale": Field(checks.numbers_in, (0, 10), "string"),
}
SOURCES = ("image", "mask_image", "control_image", "ip_adapter_image")
_of_images = attrgetter(*IMAGE_FIELDS)

# Fields that may have a value for each of several images: of numbers, and all of them.
NUMBERS = ("controlnet_conditioning_scale", "control_mode", "ip_adapter_scale")
SEVERAL = ("control_image", "ip_adapter_image", *NUMBERS)
# The columns of such requests in plans and records, with their Arrow types.
IMAGE_COLUMNS = {
    column: field.column
    for name, field in IMAGE_FIELDS.items()
    for column in (
        (_column(name), f"{_column(name)}_sha256") if name in SOURCES else (_column(name),)
    )
}

# Those that were added after the first datasets with images. Records have one only if a row has a
# value for it, so that older datasets can be continued and extended.
LATER_COLUMNS = ("image_guidance_scale", "control_mode")


# The checks that need a model, which knows its sizes and samplers, and others in their place.
_WITHOUT_MODEL = {
    checks.side: (checks.integer, 1, checks.MAX_SIDE_PX),
    checks.choice: (checks.text,),
}
# The checks of the fields that are not images, with their arguments.
_CHECKS = {
    name: _WITHOUT_MODEL.get(field.check, (field.check, *field.arguments))
    for name, field in {**FIELDS, **IMAGE_FIELDS}.items()
    if name not in SOURCES
}


def derived_seed(job_seed: int, row_id: str, image_index: int) -> int:
    """Returns the seed of an image whose row has none, independent of the row's position."""
    text = f"{job_seed}|{row_id}|{image_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


# The fields that a plan keeps.
_NAMES = tuple(each.name for each in fields(Request) if each.name != "latents")


def to_columns(requests: Sequence[Request]) -> dict[str, list]:
    """Returns requests, whose images are sources, as lists of values by column.

    Of several images or numbers, one is written alone, and more as a JSON list.
    """
    values = {name: [*map(attrgetter(name), requests)] for name in _NAMES}
    for name in SOURCES:
        sources = values.pop(name)
        if name not in SEVERAL:
            sources = [source and [source] for source in sources]
        for ending, part in ("", 0), ("_sha256", 1):
            values[f"{_column(name)}{ending}"] = [
                several and _joined([source[part] for source in several]) for several in sources
            ]
    for name in NUMBERS:
        values[name] = [several and _joined([*several]) for several in values[name]]
    values["outpaint"] = [px and ",".join(map(str, px)) for px in values["outpaint"]]
    return values


def from_columns(values: dict) -> Request:
    """Returns the request that `to_columns` wrote as these values; those of images may be missing.

    Args:
      values: one for each column.
    """
    values = {**dict.fromkeys(IMAGE_COLUMNS), **values}
    for name in SOURCES:
        address = values.pop(_column(name))
        sha256 = values.pop(f"{_column(name)}_sha256")
        values[name] = None
        if address is not None and name in SEVERAL:
            values[name] = tuple(map(Source, checks.texts(name, address), checks.texts("", sha256)))
        elif address is not None:
            values[name] = Source(address, sha256)
    for name in (*NUMBERS, "outpaint"):
        if values[name] is not None:
            field = IMAGE_FIELDS[name]
            values[name] = field.check(name, values[name], *field.arguments)
    return Request(**values)


def _joined(parts: list) -> str:
    if len(parts) == 1:
        return str(parts[0])
    return json.dumps(parts, ensure_ascii=False)


def field_checks(
    size_multiple: int, largest_side: int, samplers: Sequence[str]
) -> dict[str, tuple]:
    """Returns the checks of a `Request` for a model: by field name, the check and its arguments.

    Args:
      size_multiple: width and height must be multiples of it, in pixels.
      largest_side: width and height must be at most this, in pixels.
      samplers: the names of the samplers that the model supports.
    """
    sides = size_multiple, largest_side
    of_model = {"width": sides, "height": sides, "sampler": (samplers,)}
    return {
        name: (field.check, *field.arguments, *of_model.get(name, ()))
        for name, field in FIELDS.items()
    }


# Marks an option or setting that was added after the first plans of version 5. Plan identities
# omit it while it has its default: see `settings.written`.
LATER = {"later": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is loaded and sampled: the same for every image of a run.

    Attributes:
      dtype: "float32" or "bfloat16", for the weights and the networks' arithmetic.
      noise: "jax", or "torch" for the noise that PyTorch's CPU generator draws.
      mesh: for instance "data=4,model=2"; None splits each batch over all devices.
      scheduler: changes to `scheduler_config.json`, by diffusers' names, for instance
        "use_karras_sigmas=true, timestep_spacing=trailing".
      eta: how much new noise DDIM adds at each step, 0 to 1 (arXiv:2010.02502, equation 16).
      guidance_rescale: phi, 0 to 1, against overexposure (Lin et al., 2024, arXiv:2305.08891, 3.4).
      guidance_start, guidance_stop: the range of steps that is guided, as fractions from 0 to 1
        (Kynkäänniemi et al., 2024, arXiv:2404.07724); unguided steps cost half as much.
      clip_skip: how many of the text encoder's last layers are skipped.
      prompt_chunks: the maximum number of 75-token chunks per prompt; longer prompts are truncated.
      refiner_start: the fraction of the noise levels after which a refiner takes over, 0 to 1.
      deep_cache: of this many consecutive U-Net evaluations, only the first is complete; the others
        reuse its deep features (Ma et al., 2023, arXiv:2312.00858). 1 disables reuse.
      skip_layers: the denoiser's blocks, such as "7, 8, 9", that a third evaluation of early guided
        steps leaves out; the images are led away from what it predicts (Stability AI's skip-layer
        guidance for Stable Diffusion 3.5 medium). "" for none.
      keep_unmasked: "on" pastes what a mask leaves out from the original image, with a soft edge
        inside the painted part; "off" returns it as the autoencoder decodes it.
      guess_mode: "on" lets ControlNets steer the prompt's half of a guided step only, and the
        deep layers more than the outer ones (Zhang et al., 2023, arXiv:2302.05543).
      weights: "int8" or "fp8" stores the kernels of denoisers, ControlNets and text encoders in 8
        bits, half of bfloat16; "w8a8" also multiplies 8-bit integers in linear layers; "full"
        stores them in `dtype`. See `weights.quantization`.
      text_encoders: where they are: "device" keeps them on the mesh; "unload" keeps them in the
        host's memory, and on the mesh only while they encode the prompts of many images; "host"
        runs them on the host's CPU.
      preprocess: "canny" shows ControlNets the edges of their images, "none" the images themselves.
    """

    dtype: str = "float32"
    noise: str = "jax"
    mesh: str | None = None
    scheduler: str = ""
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    clip_skip: int = 0
    prompt_chunks: int = 1
    refiner_start: float = 0.8
    deep_cache: int = 1
    skip_layers: str = field(default="", metadata=LATER)
    keep_unmasked: str = field(default="on", metadata=LATER)
    guess_mode: str = field(default="off", metadata=LATER)
    preprocess: str = field(default="none", metadata=LATER)
    weights: str = field(default="full", metadata=LATER)
    text_encoders: str = field(default="device", metadata=LATER)

    @property
    def skipped_layers(self) -> tuple[int, ...]:
        """The numbers in `skip_layers`."""
        return tuple(map(int, filter(None, self.skip_layers.split(", "))))


FRACTION = (checks.number, 0, 1)
# The checks of `Options`, in the same form.
OPTION_CHECKS = {
    "dtype": (checks.choice, checks.DTYPES),
    "noise": (checks.choice, checks.NOISES),
    "mesh": (checks.text,),
    "scheduler": (checks.scheduler,),
    "eta": FRACTION,
    "guidance_rescale": FRACTION,
    "guidance_start": FRACTION,
    "guidance_stop": FRACTION,
    "clip_skip": (checks.integer, 0, checks.MAX_CLIP_SKIP),
    "prompt_chunks": (checks.integer, 1, checks.MAX_PROMPT_CHUNKS),
    "refiner_start": FRACTION,
    "deep_cache": (checks.integer, 1, checks.MAX_DEEP_CACHE),
    "skip_layers": (checks.layers,),
    "keep_unmasked": (checks.choice, checks.SWITCH),
    "guess_mode": (checks.choice, checks.SWITCH),
    "preprocess": (checks.choice, checks.PREPROCESSORS),
    "weights": (checks.choice, checks.WEIGHTS),
    "text_encoders": (checks.choice, checks.PLACES),
}
