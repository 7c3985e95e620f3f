"""The checkpoints that make an image together: a base and perhaps a refiner. Imports no JAX."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.controlnet import ControlNetFiles
from jaxdiff.checkpoint.ip_adapter import IPAdapterFiles
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
from jaxdiff.families import config_values, image_inputs
from jaxdiff.families.family import CLASSIFIER_FREE, OWN_OPTIONS
from jaxdiff.families.image_inputs import ImageInputs
from jaxdiff.families.second_pass import SecondPass
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint
from jaxdiff.families.upscaler import UPSCALER
from jaxdiff.images.tiles import Tiling
from jaxdiff.request import NOT_SAMPLED, Bucket, Options, Request


class Steps(NamedTuple):
    """The sampling steps of a bucket's images.

    Attributes:
      tables: the sampler's table for each denoiser.
      ranges: which denoiser evaluates which rows, whether guided, and how estimates are clamped.
      begin: the number of rows before them, which are skipped because another image is the start.
      bucket: the bucket in whose size the denoisers see the images.
      windows: where on the latents they see them in windows; None if they see them whole.
    """

    tables: Sequence[SamplerTable]
    ranges: tuple[StepRange, ...]
    begin: int
    bucket: Bucket
    windows: Tiling | None = None

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
      second_pass: how enlarged latents are denoised again, if they are.
    """

    base: Checkpoint
    refiner: Checkpoint | None = None
    controls: tuple[Addition, ...] = ()
    adapters: tuple[Addition, ...] = ()
    upscaler: Upscaling | None = None
    second_pass: SecondPass | None = None

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
        takes = self._image_inputs
        return None if takes is None else takes.enlarges

    @property
    def upscales(self) -> float | None:
        """By how much the images that the base makes are enlarged; None if they are not."""
        by = self.second_pass or (self.upscaler if self.samples else None)
        return None if by is None else by.factor

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
        if self.second_pass is not None:
            parts.append(str(self.second_pass))
        if len(parts) == 1:
            return self.base.fingerprint
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @cached_property
    def control_kinds(self) -> tuple[int, ...]:
        """The number of kinds of images that each union ControlNet knows; none for others."""
        return tuple(each.files.kinds for each in self.controls if each.files.kinds)

    # These are asked for every row of a manifest.
    @cached_property
    def _image_inputs(self) -> ImageInputs | None:
        return self.base.family.image_inputs(self.base)

    @cached_property
    def _is_flow(self) -> bool:
        return scheduler_config.prediction_type(self.base.defaults.scheduler) == "flow"

    @cached_property
    def _scales(self) -> tuple[tuple[float, ...], ...]:
        kinds = self.controls, self.adapters
        return tuple(tuple(each.scale for each in kind) for kind in kinds)

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

    def lost_tokens(self, chunks: int) -> Callable[[Collection[str]], dict[str, int]]:
        """Returns a function that maps prompts to the numbers of their tokens that are cut off.

        Of a checkpoint's text encoders, the one that loses least counts; of the checkpoints, the
        one that loses most.

        Args:
          chunks: `Options.prompt_chunks`.
        """
        each = [of_checkpoint(checkpoint).values() for checkpoint in self.checkpoints]

        def lost(prompts: Collection[str]) -> dict[str, int]:
            most = dict.fromkeys(prompts, 0)
            for of in each:
                losses = zip(*(tokenizer.lost([*most], chunks) for tokenizer in of), strict=True)
                for prompt, lost in zip(most, losses, strict=bool(of)):
                    most[prompt] = max(most[prompt], min(lost))
            return most

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
        for name in ("weights", "text_encoders"):
            if getattr(options, name) != getattr(usual, name) and not self.samples:
                said = name.replace("_", "-")
                raise InputError(
                    f"--{said} has no effect on {self.base.defaults.name}; leave it out"
                )
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
        is_flow, takes = self._is_flow, self._image_inputs
        controls, adapters = self._scales
        if self.second_pass is not None:
            self.second_pass.check(request, self.base.defaults, is_flow=is_flow)
        request = image_inputs.with_image(request, takes, strength, is_flow=is_flow)
        if self.base.family.sees_control:
            request = image_inputs.with_control(request)
        else:
            request = image_inputs.with_controls(request, controls, self.control_kinds)
        return image_inputs.with_prompts(request, adapters)

    def passes(self, options: Options, bucket: Bucket) -> tuple[Steps, ...]:
        """Returns the steps in which a bucket's images are made: once, or in two passes.

        Raises:
          InputError: as `steps` does.
        """
        first, again = self.steps(options, bucket), self.second_pass
        if again is None:
            return (first,)
        defaults = self.base.defaults
        second = self.steps(options, again.bucket(bucket, defaults))
        return first, second._replace(windows=again.windows(bucket, defaults))

    def steps(self, options: Options, bucket: Bucket) -> Steps:
        """Returns the sampler's tables for a bucket, and which denoiser takes which of their rows.

        Raises:
          InputError: if the sampler does not support a scheduler's config.
        """
        configs = self.schedulers(options.scheduler)
        takes = self._image_inputs
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
        return Steps([base, *others], ranges, skipped, bucket)
