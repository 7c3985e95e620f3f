"""Which checkpoints make an image together: one, or a base and its refiner. Imports no JAX."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.checkpoint.layout import Checkpoint, open_checkpoint
from jaxdiff.errors import InputError

REFINER = "Stable Diffusion XL refiner"


@dataclass(frozen=True)
class Ensemble:
    """The checkpoint that begins an image, and the one, if any, that takes its last steps."""

    base: Checkpoint
    refiner: Checkpoint | None = None

    @property
    def experts(self) -> tuple[Checkpoint, ...]:
        """Those there are, in the order of their steps."""
        return (self.base,) if self.refiner is None else (self.base, self.refiner)

    @property
    def name(self) -> str:
        """What people call it."""
        return " + ".join(checkpoint.name for checkpoint in self.experts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides pixels; a lone checkpoint's own."""
        if self.refiner is None:
            return self.base.fingerprint
        parts = " ".join(checkpoint.fingerprint for checkpoint in self.experts)
        return hashlib.sha256(parts.encode()).hexdigest()


def open_ensemble(
    model: str | Path, variant: str | None = None, refiner: str | Path | None = None
) -> Ensemble:
    """Opens a model and, if one is named, its refiner.

    Args:
      model, variant: as in `open_checkpoint`.
      refiner: a second model over the same latents, the last of the paper's experts (Podell et al.,
        2023, arXiv:2307.01952, 2.5).

    Raises:
      InputError: if one cannot be read, or they do not work together.
    """
    base = open_checkpoint(model, variant)
    if base.family == REFINER:
        raise InputError(
            f"model {str(model)!r} is a refiner: name a base model, and this one as --refiner"
        )
    if refiner is None:
        return Ensemble(base)
    last = open_checkpoint(refiner, variant)
    for what in ("size_multiple", "latent_channels"):
        ours, theirs = getattr(base, what), getattr(last, what)
        if ours != theirs:
            raise InputError(
                f"--refiner {str(refiner)!r} has latents of another shape than the model "
                f"({what} {theirs}, not {ours})"
            )
    return Ensemble(base, last)
