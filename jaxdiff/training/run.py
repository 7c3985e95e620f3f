"""`jaxdiff train`: from a recipe file to a trained model."""

import contextlib
import shutil
from pathlib import Path

from jaxdiff import compilation
from jaxdiff.errors import InputError
from jaxdiff.training import autoencoder, loop, text_encoder, text_to_image
from jaxdiff.training.recipe import (
    AutoencoderRecipe,
    DecoderRecipe,
    Recipe,
    TextEncoderRecipe,
    TextToImageRecipe,
    read,
)


def train(recipe_path: str | Path, output: str | Path) -> None:
    """Trains what `recipe_path` describes into `output`, or continues what was begun there.

    Raises:
      InputError: if the recipe cannot be used, or if `output` holds another recipe's run.
    """
    recipe_path, output = Path(recipe_path), Path(output)
    recipe = read(recipe_path)
    compilation.keep_programs()
    kept = output / "recipe.toml"
    if kept.exists() and read(kept) != recipe:
        raise InputError(f"{output}: holds a run of another recipe; name another --output")
    output.mkdir(parents=True, exist_ok=True)
    begun = kept.exists()
    if not begun:
        shutil.copyfile(recipe_path, kept)
    try:
        task = _task(recipe, output)
    except InputError:
        if not begun:  # leave no trace, so that the mended recipe can run here
            kept.unlink()
            with contextlib.suppress(OSError):
                output.rmdir()
        raise
    loop.fit(task, recipe, output)


def _task(recipe: Recipe, output: Path) -> loop.Task:
    match recipe:
        case AutoencoderRecipe():
            return autoencoder.task(recipe)
        case DecoderRecipe():
            return autoencoder.decoder_task(recipe)
        case TextEncoderRecipe():
            return text_encoder.task(recipe)
        case TextToImageRecipe():
            return text_to_image.task(recipe, output)
