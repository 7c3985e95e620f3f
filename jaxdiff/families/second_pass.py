"""The second pass of `--upscale latent`, which denoises enlarged latents. Imports no JAX."""

import re
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.diffusion.step_ranges import skipped_steps
from jaxdiff.families.family import Defaults
from jaxdiff.images import fitting, tiles
from jaxdiff.images.tiles import Tiling
from jaxdiff.request import Bucket, Request

LATENT = "latent"
STRENGTH = 0.4  # the default
MAX_FACTOR = 8
SIDES = ("width", "height")
Sized = TypeVar("Sized", Bucket, Request)


class SecondPass(NamedTuple):
    """How an image is made anew from its enlarged latents.

    Sides beyond those of the first pass and of the model's own images are denoised in windows that
    overlap, which are fused in every step (Bar-Tal et al., 2023, arXiv:2302.08113).

    Attributes:
      factor: by how much the sides of the latents are enlarged.
      strength: the share of the steps that are taken again, as in `Request`.
    """

    factor: float
    strength: float

    def __str__(self) -> str:
        return f"{LATENT}:{self.factor:g},strength={self.strength:g}"

    def check(self, request: Request, defaults: Defaults, *, is_flow: bool) -> None:
        """Raises BadValueError for a request that cannot be made in two passes.

        Args:
          request: with its size and steps.
          defaults: the model's.
          is_flow: whether the model was trained by flow matching.
        """
        if request.mask_image is not None or request.outpaint is not None:
            raise BadValueError("--upscale latent changes all of an image; use no mask or outpaint")
        for name in SIDES:
            side, multiple = getattr(request, name) * self.factor, defaults.size_multiple
            is_whole = abs(side - round(side)) < 1e-6  # 1.1 times 640 is not quite 704
            if not is_whole or round(side) % multiple or side > checks.MAX_SIDE_PX:
                raise BadValueError(
                    f"{name} = {getattr(request, name)} becomes {side:g} with --upscale "
                    f"{LATENT}:{self.factor:g}; it must become a multiple of {multiple} up to "
                    f"{checks.MAX_SIDE_PX}"
                )
        if skipped_steps(request.steps, self.strength, is_flow=is_flow) == request.steps:
            raise BadValueError(
                f"--upscale {self} takes none of {request.steps} steps again; raise one of them"
            )

    def request(self, first: Request) -> Request:
        """Returns the second pass's request: larger, with enlarged control images and no image."""
        larger = self.enlarged(first)
        controls = first.control_image
        if controls is not None and isinstance(controls[0], np.ndarray):
            size = larger.height, larger.width
            controls = tuple(fitting.fitted(image, *size) for image in controls)
        return replace(
            larger, image=None, latents=None, strength=self.strength, control_image=controls
        )

    def bucket(self, first: Bucket, defaults: Defaults) -> Bucket:
        """Returns the second pass's bucket, in whose size the denoiser sees each window."""
        larger, (width, height) = self.enlarged(first), defaults.size
        return larger._replace(
            width=min(larger.width, max(first.width, width)),
            height=min(larger.height, max(first.height, height)),
            strength=self.strength,
        )

    def windows(self, first: Bucket, defaults: Defaults) -> Tiling | None:
        """Returns where on the latents the denoiser sees windows; None if it sees them whole."""
        larger, seen = self.enlarged(first), self.bucket(first, defaults)
        sides = larger.height, larger.width, seen.height, seen.width
        found = tiles.windows(*(side // defaults.factor for side in sides))
        return None if found.count == 1 else found

    def enlarged(self, first: Sized) -> Sized:
        """Returns a request or a bucket of the enlarged size."""
        sides = {name: fitting.enlarged(getattr(first, name), self.factor) for name in SIDES}
        return first._replace(**sides) if isinstance(first, Bucket) else replace(first, **sides)


def is_asked(said: str) -> bool:
    """Checks whether the argument of `--upscale` asks for a second pass, not for an upscaler."""
    return re.split("[:,]", said)[0] == LATENT


def parse(said: str) -> SecondPass:
    """Reads "latent:FACTOR" or "latent:FACTOR,strength=S".

    Raises:
      BadValueError: naming the part that is wrong.
    """
    form = re.fullmatch(rf"{LATENT}:([^,]*)(?:,\s*strength=(.*))?", said)
    if form is None:
        raise BadValueError(f"--upscale {said}: write it as latent:1.5 or latent:1.5,strength=0.4")
    return SecondPass(
        checks.number(f"--upscale {said}: the factor", form[1], 1, MAX_FACTOR),
        checks.number(f"--upscale {said}: strength", form[2] or STRENGTH, 0, 1),
    )
