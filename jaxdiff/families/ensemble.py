"""Which checkpoints make an image together: one, or a base and its refiner. Imports no JAX."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.checkpoint import lora as loras
from jaxdiff.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdiff.checkpoint.weight_files import NoVariantError
from jaxdiff.errors import InputError

REFINER = "Stable Diffusion XL refiner"
# What turns an autoencoder's latents into a U-Net's, and the class's defaults.
LATENTS = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


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
    model: str | Path,
    variant: str | None = None,
    refiner: str | Path | None = None,
    lora: Sequence[str] = (),
) -> Ensemble:
    """Opens a model and, if they are named, its refiner and what its weights are adapted by.

    Args:
      model, variant: as in `open_checkpoint`. The model must have the variant; a refiner that has
        none of it gives the weights that it gives unasked.
      refiner: a second model over the same latents, the last of the paper's experts (Podell et al.,
        2023, arXiv:2307.01952, 2.5).
      lora: files to add to the model's weights, as in `lora.adapted`; a refiner has none.

    Raises:
      InputError: if one cannot be read, or they do not work together.
    """
    base = open_checkpoint(model, variant)
    if base.family == REFINER:
        raise InputError(
            f"model {str(model)!r} is a refiner: name a base model, and this one as --refiner"
        )
    base = loras.adapted(base, lora)
    if refiner is None:
        return Ensemble(base)
    try:
        last = open_checkpoint(refiner, variant)
    except NoVariantError:
        last = open_checkpoint(refiner)
    ours, theirs = _latents(base), _latents(last)
    for what in ours:
        if ours[what] != theirs[what]:
            raise InputError(
                f"--refiner {str(refiner)!r} has other latents than the model "
                f"({what} {theirs[what]}, not {ours[what]}); name the refiner of this model"
            )
    return Ensemble(base, last)


def _latents(checkpoint: Checkpoint) -> dict:
    """All that tells the latents of one checkpoint from those of another."""
    config = checkpoint.config("vae")
    shape = {"size_multiple": checkpoint.size_multiple, "channels": checkpoint.latent_channels}
    return shape | {key: config.get(key, default) for key, default in LATENTS.items()}
