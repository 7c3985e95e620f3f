"""The settings that determine a dataset's bytes, along with its manifest and its model."""

from dataclasses import dataclass, field, fields
from typing import Literal

from jaxdiff import checks
from jaxdiff.dataset import formats
from jaxdiff.devices.batching import AUTO
from jaxdiff.diffusion.scheduler_config import check_steps
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.families.family import UNGUIDED
from jaxdiff.images import image_files, preprocessing
from jaxdiff.request import LATER, OPTION_CHECKS, Options, Request, field_checks

FORMATS = tuple(formats.FORMATS)
IMAGE_FORMATS = tuple(image_files.EXTENSIONS)


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """The job's resolved settings: the model's options and all else that determines its bytes.

    Those from `num_images` to `negative_prompt` are the defaults of rows that do not set them; the
    seeds of rows without a seed are derived from `seed`. The rest apply to the whole dataset.
    """

    num_images: int = 1
    seed: int = 0
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    negative_prompt: str = Request.negative_prompt
    strength: float | None = field(default=None, metadata=LATER)
    limit: int | None = None
    prompt_column: str | None = None
    format: str = "webdataset"
    image_format: str = "png"
    images_per_shard: int | None = None
    batch_size: int | Literal["auto"] = "auto"


def written(settings: Settings) -> dict:
    """Returns the settings as plan identities store them.

    A `LATER` option is omitted while it has its default, so that older plans keep their ids.
    """
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.metadata != LATER or getattr(settings, field.name) != field.default
    }


# The checks of the settings that are not fields of `Request`, with their arguments.
CHECKS = {
    "num_images": (checks.integer, 1, checks.MAX_IMAGES),
    "strength": (checks.number, 0, 1),
    "limit": (checks.integer, 1, 10**9),
    "prompt_column": (checks.text,),
    "format": (checks.choice, FORMATS),
    "image_format": (checks.choice, IMAGE_FORMATS),
    "images_per_shard": (checks.integer, 1, 100_000),
    "batch_size": (checks.integer_or, AUTO, 1, 4096),
}
NAMES = tuple(field.name for field in fields(Settings))


def resolve(said: dict, model: Ensemble) -> Settings:
    """Checks the given settings and takes the others from the model or the defaults.

    Args:
      said: by name (of `NAMES`), as text or in their own type; None counts as not given.
      model: with the refiner, if there is one.

    Raises:
      InputError: names the option and its allowed values.
    """
    defaults = model.base.defaults
    said = {name: value for name, value in said.items() if value is not None}
    for name in ("width", "height"):
        if model.enlarges is not None and name in said:
            raise InputError(
                f"--{name} has no effect on {defaults.name}, which enlarges each image by "
                f"{model.enlarges}; leave it out"
            )
    for name in ("steps", "guidance_scale", "strength"):
        if not model.samples and name in said:
            option = name.replace("_", "-")
            raise InputError(f"--{option} has no effect on {defaults.name}; leave it out")
    said.setdefault("steps", defaults.steps)  # may be too many for the sampler
    every = (
        CHECKS
        | field_checks(defaults.size_multiple, defaults.largest_side, model.samplers)
        | OPTION_CHECKS
    )
    settings = {"guidance_scale": defaults.guidance_scale}
    for name, value in said.items():
        check, *arguments = every[name]
        try:
            settings[name] = check(f"--{name.replace('_', '-')}", value, *arguments)
        except checks.BadValueError as problem:
            raise InputError(str(problem)) from None
    if "width" not in said or "height" not in said:
        width, height = defaults.size
        settings = {"width": width, "height": height, **settings}
    if "sampler" not in said:
        settings["sampler"] = defaults.sampler
    changes, eta = settings.get("scheduler", ""), settings.get("eta", Options.eta)
    try:
        check_steps(settings["sampler"], settings["steps"], model.schedulers(changes), eta)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None
    resolved = Settings(**settings)
    model.check_options(resolved)
    preprocessing.check(resolved.preprocess)
    if defaults.guidance == UNGUIDED and resolved.guidance_scale > 1:
        raise InputError(
            f"--guidance-scale has no effect on {defaults.name}, which was distilled to need none; "
            "leave it out"
        )
    return resolved
