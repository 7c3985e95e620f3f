"""Trains a model from a recipe file (`jaxdiff train`) and exports checkpoints."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.training import (
    autoencoder,
    consistency,
    loop,
    text_encoder,
    text_to_image,
    upscaler,
)
from jaxdiff.training.batches import ClassImages
from jaxdiff.training.recipe import (
    AutoencoderRecipe,
    ConsistencyRecipe,
    Recipe,
    TextEncoderRecipe,
    TextToImageRecipe,
    UpscalerRecipe,
    flat,
    read,
)

LOCK = ".lock"
RECIPE = "recipe.toml"


def train(
    recipe_path: str | Path, output: str | Path, class_images: ClassImages | None = None
) -> bool:
    """Runs a recipe and writes to `output`, or resumes the run there.

    Args:
      class_images: as in `batches.prepare`.

    Returns:
      whether training finished; see `loop.fit`, also for further exceptions.

    Raises:
      InputError: if the recipe is invalid, if `output` contains a run of another recipe, or if
        another process is training into it.
    """
    recipe_path, output = Path(recipe_path), Path(output)
    recipe = read(recipe_path)
    compilation.keep_programs()
    kept = output / RECIPE
    begun = kept.exists()
    if begun:
        _refuse_another(read(kept), recipe, output)
    output.mkdir(parents=True, exist_ok=True)
    with _held(output):
        unfinished = output / f"{RECIPE}.unfinished"
        shutil.copyfile(recipe_path, unfinished)
        os.replace(unfinished, kept)
        try:
            task = _task(recipe, output, class_images)
        except InputError:
            if not begun:  # clean up, so that the corrected recipe can run here
                kept.unlink()
                (output / LOCK).unlink()
                with contextlib.suppress(OSError):
                    output.rmdir()
            raise
        try:
            return loop.fit(task, recipe, output)
        except OSError as problem:
            problem.filename = problem.filename or str(output)  # a full disk gives no file name
            raise


def export(
    recipe_path: str | Path,
    output: str | Path,
    which: str,
    to: Path | None,
    class_images: ClassImages | None = None,
) -> Path:
    """Exports the model of a checkpoint in `output`, even while another process trains there.

    Args:
      which: "last", "best" or a step number.
      to: the model's directory; by default a directory in `output` named after the step.
      class_images: as in `batches.prepare`.

    Returns:
      the model's directory.

    Raises:
      InputError: if the recipe is invalid or differs from that of the run, or if the checkpoint
        does not exist.
    """
    output = Path(output)
    recipe = read(Path(recipe_path))
    if not (output / RECIPE).exists():
        raise InputError(f"{output}: contains no run to export; train first")
    _refuse_another(read(output / RECIPE), recipe, output)
    compilation.keep_programs()
    return loop.export(_task(recipe, output, class_images), recipe, output, which, to)


def _refuse_another(old: Recipe, new: Recipe, output: Path) -> None:
    """Raises InputError if a run cannot continue with the new recipe.

    `checkpoints` may change. `steps` may grow if the learning rate does not depend on it.
    """
    before, now = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    for key in {**before, **now}:
        was, is_now = before.get(key), now.get(key)
        if was == is_now or key.startswith("checkpoints."):
            continue
        mend = "choose another --output"
        if key == "steps":
            endless = new.optimizer.schedule == "constant" and not new.optimizer.cooldown_steps
            if endless and is_now > was:
                continue
            mend += "; a run can be extended only with a constant learning rate and no cool-down"
        raise InputError(
            f"{output}: contains a run of another recipe ({key} was {was!r}, is {is_now!r}); {mend}"
        )


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """Locks the directory for this process; the kernel releases the lock if the process dies."""
    with (output / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{output}: another process is training here; wait or choose another --output"
            ) from None
        yield


def _task(recipe: Recipe, output: Path, class_images: ClassImages | None) -> loop.Task:
    match recipe:
        case AutoencoderRecipe():
            return autoencoder.task(recipe)
        case TextEncoderRecipe():
            return text_encoder.task(recipe)
        case TextToImageRecipe():
            return text_to_image.task(recipe, output, class_images)
        case ConsistencyRecipe():
            return consistency.task(recipe)
        case UpscalerRecipe():
            return upscaler.task(recipe)
