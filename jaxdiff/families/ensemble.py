"""The checkpoints that make an image together: a base and perhaps a refiner. Imports no JAX."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdiff import checks
from jaxdiff.checkpoint import lora as loras
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.controlnet import ControlNetFiles, open_controlnet, scaled, split_number
from jaxdiff.checkpoint.ip_adapter import IPAdapterFiles, open_ip_adapter
from jaxdiff.checkpoint.weight_files import NoVariantError
from jaxdiff.checks import BadValueError
from jaxdiff.diffusion import samplers, scheduler_config
from jaxdiff.diffusion.solvers import SamplerTable
from jaxdiff.diffusion.step_ranges import (
    StepRange,
    after,
    skipped_steps,
    step_ranges,
    with_control,
)
from jaxdiff.errors import InputError
from jaxdiff.families import config_values, image_inputs, open_checkpoint
from jaxdiff.families.family import CLASSIFIER_FREE, OWN_OPTIONS
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint
from jaxdiff.families.upscaler import UPSCALER
from jaxdiff.request import NOT_SAMPLED, Bucket, Options, Request

# The models that take what an option names.
WORKS_WITH = {
    image_inputs.CONTROLS: "Stable Diffusion 1, 2 and XL, FLUX.1 dev and schnell",
    image_inputs.ADAPTERS: "Stable Diffusion 1, 2 and XL",
}


class Steps(NamedTuple):
    """The sampling steps of a bucket's images.

    Attributes:
      tables: the sampler's table for each denoiser.
      ranges: which denoiser evaluates which rows, whether guided, and how estimates are clamped.
      begin: the number of rows before them, which are skipped because another image is the start.
    """

    tables: Sequence[SamplerTable]
    ranges: tuple[StepRange, ...]
    begin: int = 0

    @property
    def draws(self) -> int:
        """The number of times that fresh noise is drawn."""
        return max(0, max(table.draws for table in self.tables) - self.begin)

    @property
    def is_guided(self) -> bool:
        """Whether any step is guided."""
        return any(part.guided for part in self.ranges)

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the columns of one table that takes each row from its denoiser's table."""
        owner = np.repeat([r.denoiser for r in self.ranges], [r.rows for r in self.ranges])
        columns = [table.columns() for table in self.tables]
        rows = [*enumerate(owner, self.begin)]
        return {
            name: np.stack([columns[denoiser][name][row] for row, denoiser in rows])
            for name in columns[0]
        }


class Upscaling(NamedTuple):
    """An upscaler, and by how much it enlarges images."""

    checkpoint: Checkpoint
    factor: float


class Addition(NamedTuple):
    """A ControlNet or an IP-Adapter, and its default scale."""

    files: ControlNetFiles | IPAdapterFiles
    scale: float


@dataclass(frozen=True)
class Ensemble:
    """The checkpoint that starts an image, and what is used with it.

    Attributes:
      base: the checkpoint that starts an image.
      refiner: the one that takes the last steps, if any.
      controls: the ControlNets that steer the base.
      adapters: the IP-Adapters that show it image prompts.
      upscaler: what enlarges the images, if anything does; if the base is an upscaler, the base.
    """

    base: Checkpoint
    refiner: Checkpoint | None = None
    controls: tuple[Addition, ...] = ()
    adapters: tuple[Addition, ...] = ()
    upscaler: Upscaling | None = None

    @property
    def samples(self) -> bool:
        """Whether images are sampled; if not, the images of the requests are enlarged."""
        return self.base.family is not UPSCALER

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names of the samplers that a request may ask for."""
        return tuple(samplers.SAMPLERS) if self.samples else (NOT_SAMPLED,)

    @property
    def enlarges(self) -> int | None:
        """By how much the base enlarges the image of a request; None if it does not."""
        takes = self.base.family.image_inputs(self.base)
        return None if takes is None else takes.enlarges

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The base and the refiner, if there is one, in the order of their steps."""
        return (self.base,) if self.refiner is None else (self.base, self.refiner)

    @property
    def name(self) -> str:
        """The name to show."""
        return " + ".join(checkpoint.name for checkpoint in self.checkpoints)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all files that affect the pixels; of a base alone, its own."""
        every = [*self.checkpoints, *(each.files for each in (*self.controls, *self.adapters))]
        parts = [each.fingerprint for each in every]
        if self.samples and self.upscaler is not None:
            parts += [self.upscaler.checkpoint.fingerprint, f"x{self.upscaler.factor:g}"]
        if len(parts) == 1:
            return self.base.fingerprint
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def control_kinds(self) -> tuple[int, ...]:
        """The number of kinds of images that each union ControlNet knows; none for others."""
        return tuple(each.files.kinds for each in self.controls if each.files.kinds)

    def schedulers(self, changes: str) -> list[dict]:
        """Returns each checkpoint's scheduler config with the changes in `Options.scheduler`.

        There are none if nothing is sampled.
        """
        if not self.samples:
            return []
        return [
            scheduler_config.changed(checkpoint.defaults.scheduler, changes)
            for checkpoint in self.checkpoints
        ]

    def lost_tokens(self, chunks: int) -> Callable[[str], int]:
        """Returns a function that maps a prompt to the number of its tokens that are cut off.

        Of a checkpoint's text encoders, the one that loses least counts; of the checkpoints, the
        one that loses most.

        Args:
          chunks: `Options.prompt_chunks`.
        """
        each = [of_checkpoint(checkpoint).values() for checkpoint in self.checkpoints]

        def lost(prompt: str) -> int:
            return max(
                min((tokenizer.lost(prompt, chunks) for tokenizer in of), default=0) for of in each
            )

        return lost

    def check_options(self, options: Options) -> None:
        """Raises InputError for an option that has no effect on the base model."""
        usual = Options()
        for name in sorted(OWN_OPTIONS - self.base.family.own_options):
            if getattr(options, name) != getattr(usual, name):
                raise InputError(
                    f"--{name.replace('_', '-')} has no effect on {self.base.defaults.name}; leave "
                    "it out"
                )
        sees_control = self.controls or self.base.family.sees_control
        for name, has_effect in (("guess_mode", self.controls), ("preprocess", sees_control)):
            if getattr(options, name) != getattr(usual, name) and not has_effect:
                said = name.replace("_", "-")
                raise InputError(f"--{said} has no effect without --controlnet; leave it out")
        skipped = options.skipped_layers
        if skipped:
            count = config_values.integer(self.base, "transformer", "num_layers", 18)
            if skipped[-1] >= count:
                raise InputError(
                    f"--skip-layers {options.skip_layers}: the model has only the layers 0 to "
                    f"{count - 1}"
                )

    def with_images(self, request: Request, strength: float | None = None) -> Request:
        """Returns a request whose values about images are filled in and fit the models.

        Args:
          request: with its number of steps.
          strength: the job's default.

        Raises:
          BadValueError: as the functions of `image_inputs` do.
        """
        if not self.samples and request.steps != self.base.defaults.steps:
            raise BadValueError("an upscaler takes no steps; leave steps out")
        is_flow = scheduler_config.prediction_type(self.base.defaults.scheduler) == "flow"
        takes = self.base.family.image_inputs(self.base)
        controls, adapters = (
            tuple(each.scale for each in kind) for kind in (self.controls, self.adapters)
        )
        request = image_inputs.with_image(request, takes, strength, is_flow=is_flow)
        if self.base.family.sees_control:
            request = image_inputs.with_control(request)
        else:
            request = image_inputs.with_controls(request, controls, self.control_kinds)
        return image_inputs.with_prompts(request, adapters)

    def steps(self, options: Options, bucket: Bucket) -> Steps:
        """Returns the sampler's tables for a bucket, and which denoiser takes which of their rows.

        Raises:
          InputError: if the sampler does not support a scheduler's config.
        """
        configs = self.schedulers(options.scheduler)
        takes = self.base.family.image_inputs(self.base)
        schedules = [
            checkpoint.family.schedule(config, bucket)
            for checkpoint, config in zip(self.checkpoints, configs, strict=True)
        ]

        skipped = 0
        if bucket.strength is not None:
            skipped = skipped_steps(bucket.steps, bucket.strength, is_flow=schedules[0].is_flow)
        skipped *= samplers.SAMPLERS[bucket.sampler].rows_per_step

        def table(number: int, begin: int) -> SamplerTable:
            return samplers.sampler_table(
                bucket.sampler, schedules[number], bucket.steps, eta=options.eta, begin=begin
            )

        base = table(0, skipped)
        ranges = step_ranges(
            base.timesteps,
            options,
            guided=bucket.guided,
            guidable=[each.defaults.guidance == CLASSIFIER_FREE for each in self.checkpoints],
            clamps=[schedule.clamp for schedule in schedules],
            steps=bucket.steps,
            train_steps=scheduler_config.train_steps(configs[0]),
            image_guided=takes is not None and takes.guidance_scale is not None,
        )
        refined = max(skipped, sum(part.rows for part in ranges if part.denoiser == 0))
        others = [table(number, refined) for number in range(1, len(self.checkpoints))]
        ranges = after(ranges, skipped)
        if self.controls and bucket.control is not None:
            ranges = with_control(ranges, *bucket.control)
        return Steps([base, *others], ranges, skipped)


def open_ensemble(
    model: str | Path,
    variant: str | None = None,
    refiner: str | Path | None = None,
    lora: Sequence[str] = (),
    base: str | Path | None = None,
    controlnet: Sequence[str] = (),
    ip_adapter: Sequence[str] = (),
    upscale: str | Path | None = None,
) -> Ensemble:
    """Opens a model and, if given, what is used with it: a refiner, LoRAs and so on.

    Args:
      model, variant, base: as in `open_checkpoint`. The model must have the variant; a refiner
        without it uses its default weights.
      refiner: a second model for the same latents, which takes the last steps (Podell et al., 2023,
        arXiv:2307.01952, 2.5).
      lora: LoRAs to add to the model's weights, as in `lora.adapted`.
      controlnet: each "DIR" or "DIR:SCALE".
      ip_adapter: each "FILE.safetensors" or "FILE.safetensors:SCALE".
      upscale: "MODEL" or "MODEL:FACTOR", an upscaler and by how much it enlarges the images.

    Raises:
      InputError: if one of them cannot be read, or they do not fit together.
    """
    first = open_checkpoint(model, variant, base)
    if first.defaults.base_needed:
        raise InputError(
            f"model {str(model)!r} is a refiner; use a base model, and this one as --refiner"
        )
    if lora and first.family is UPSCALER:
        raise InputError(f"--lora has no effect on {first.defaults.name}; leave it out")
    first = loras.adapted(first, lora)
    return Ensemble(
        base=first,
        refiner=None if refiner is None else _refiner(first, refiner, variant),
        controls=_controls(first, controlnet),
        adapters=_adapters(first, ip_adapter),
        upscaler=_upscaling(first, upscale),
    )


def _controls(base: Checkpoint, said: Sequence[str]) -> tuple[Addition, ...]:
    """Opens the ControlNets that steer the base."""
    check = base.family.check_controlnet
    _refuse_unknown(base, image_inputs.CONTROLS, said, check)
    controls = tuple(
        _addition(each, open_controlnet, lambda net: check(base, net.config)) for each in said
    )
    if len({net.files.kinds is None for net in controls}) > 1:
        raise InputError(
            f"{image_inputs.CONTROLS}: union ControlNets cannot be used together with others; use "
            "only one of these kinds in a job"
        )
    return controls


def _adapters(base: Checkpoint, said: Sequence[str]) -> tuple[Addition, ...]:
    """Opens the IP-Adapters that show the base image prompts."""
    check = base.family.check_ip_adapter
    _refuse_unknown(base, image_inputs.ADAPTERS, said, check)
    return tuple(
        _addition(each, open_ip_adapter, lambda adapter: check(base, adapter.context_width))
        for each in said
    )


def _refuse_unknown(
    base: Checkpoint, option: str, said: Sequence[str], check: Callable | None
) -> None:
    if said and check is None:
        raise InputError(
            f"{option} works with {WORKS_WITH[option]} only, not with {base.defaults.name}; "
            "leave it out"
        )


def _refiner(base: Checkpoint, said: str | Path, variant: str | None) -> Checkpoint:
    """Opens the model that takes the last steps."""
    takes = base.family.image_inputs(base)
    if takes is not None and takes.needed:
        raise InputError(
            f"--refiner cannot continue what {base.defaults.name} begins, because it would not "
            "see the image of the row; leave it out"
        )
    try:
        refiner = open_checkpoint(said, variant)
    except NoVariantError:
        refiner = open_checkpoint(said)
    ours, theirs = base.defaults.latents, refiner.defaults.latents
    for what in ours:
        if ours[what] != theirs.get(what):
            raise InputError(
                f"--refiner {str(said)!r} has different latents from the model "
                f"({what} {theirs.get(what)}, not {ours[what]}); use the refiner of this model"
            )
    return refiner


def _upscaling(base: Checkpoint, said: str | Path | None) -> Upscaling | None:
    """Opens what enlarges the images that the base makes; returns None if nothing does."""
    if base.family is UPSCALER:
        if said is not None:
            raise InputError("--upscale: the model is itself an upscaler; leave one of them out")
        return Upscaling(base, base.defaults.factor)
    if said is None:
        return None
    path, number = split_number(str(said))
    upscaler = open_checkpoint(path)
    if upscaler.family is not UPSCALER:
        raise InputError(
            f"--upscale {path} is {upscaler.defaults.name}; use a GAN upscaler, such as shapes64-x4"
        )
    scale = upscaler.defaults.factor
    if number is None:
        return Upscaling(upscaler, scale)
    try:
        return Upscaling(upscaler, checks.number(f"--upscale {said}: the factor", number, 1, scale))
    except BadValueError as problem:
        raise InputError(str(problem)) from None


def _addition(said: str, open_files: Callable, check: Callable) -> Addition:
    path, scale = scaled(said)
    files = open_files(path)
    try:
        check(files)
    except InputError as problem:
        raise InputError(f"{files.path}: {problem}") from problem
    return Addition(files, scale)
