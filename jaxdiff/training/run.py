"""`jaxdiff train`: from a recipe file to a trained model."""

import shutil
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.training import autoencoder, loop, text_to_image
from jaxdiff.training.recipe import AutoencoderRecipe, DecoderRecipe, TextToImageRecipe, read


def train(recipe_path: str | Path, output: str | Path) -> None:
    """Trains what `recipe_path` describes into `output`, or continues what was begun there.

    Raises:
      InputError: if the recipe cannot be used, or if `output` holds another recipe's run.
    """
    recipe_path, output = Path(recipe_path), Path(output)
    recipe = read(recipe_path)
    kept = output / "recipe.toml"
    if kept.exists() and read(kept) != recipe:
        raise InputError(f"{output}: holds a run of another recipe; name another --output")
    output.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        shutil.copyfile(recipe_path, kept)
    match recipe:
        case AutoencoderRecipe():
            task = autoencoder.task(recipe)
        case DecoderRecipe():
            task = autoencoder.decoder_task(recipe)
        case TextToImageRecipe():
            task = text_to_image.task(recipe, output)
    loop.fit(task, recipe, output)
