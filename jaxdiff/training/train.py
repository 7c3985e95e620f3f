"""Trains a model from a recipe file (`jaxdiff train`) and exports checkpoints."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
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
from jaxdiff.training.watch import METRICS, read_metrics

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


def summary(recipe_path: Path, output: Path) -> str:
    """Returns lines about a finished run: where its model is, its losses, and how to use it."""
    recipe = read(recipe_path)
    lines = [f"model: {output / 'model'}, after {recipe.steps} steps"]
    metrics = read_metrics(output / METRICS)
    measured = [line for line in metrics if "validation_loss" in line]
    if measured:
        best, last = min(measured, key=lambda line: line["validation_loss"]), measured[-1]
        loss = f"validation loss: {last['validation_loss']:.4g}"
        if best["step"] != last["step"] and recipe.checkpoints.keep_best:
            again = shlex.join(["jaxdiff", "train", str(recipe_path), "--output", str(output)])
            loss += f"; the best was {best['validation_loss']:.4g} at step {best['step']}: "
            loss += f"{again} --export best"
        lines.append(loss)
    elif metrics:
        lines.append(f"training loss: {metrics[-1]['loss']:.4g}")
    return "\n".join([*lines, f"to use it: {_use(recipe, output / 'model')}"])


def _use(recipe: Recipe, model: Path) -> str:
    """Returns the command, or the key of a recipe, that uses a run's model."""
    match recipe:
        case AutoencoderRecipe():
            return f"vae = {json.dumps(str(model))} in a recipe"
        case TextEncoderRecipe():
            return f"text_encoder = {json.dumps(str(model))} in a recipe"
        case UpscalerRecipe():
            words = ["upscale", "FOLDER", "--model", str(model / upscaler.FILE)]
        case TextToImageRecipe(method="lora"):
            words = ["generate", "--model", recipe.model, "--lora", str(model)]
        case TextToImageRecipe(method="controlnet"):
            words = ["generate", "--model", recipe.model, "--controlnet", str(model)]
        case _:
            words = ["generate", "--model", str(model)]
    if _takes_images(recipe):
        words += ["--manifest", "ROWS.jsonl"]
    elif words[0] == "generate":
        words += ["--prompt", "TEXT"]
    return shlex.join(["jaxdiff", *words, "--output", "out/first"])


def _takes_images(recipe: Recipe) -> bool:
    """Returns whether the rows of a manifest bring images for the trained model."""
    return getattr(recipe, "method", "") in ("controlnet", "inpaint")


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
