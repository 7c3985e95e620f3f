"""DreamBooth: class images are generated once, as a dataset, and make up half of each batch."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.dataset import ledger
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError
from jaxdiff.training import batches, data, text_to_image
from jaxdiff.training.recipe import Data, Optimizer, Prior, TextToImageRecipe
from pipelines import class_images


def test_class_images_are_generated_once_and_trained_on(tiny_checkpoint, tmp_path, capsys):
    prior = Prior(prompt="a shape", images=3, weight=0.5)
    class_images.class_images(str(tiny_checkpoint), prior, tmp_path / "prior")
    directory = tmp_path / "prior" / batches.IMAGES
    assert ledger.finished(open_run(directory))["made"] == 3
    examples = data.open_examples(Data(path=str(directory)))
    assert [examples.captions[i] for i in range(len(examples))] == ["a shape"] * 3
    capsys.readouterr()
    class_images.class_images(str(tiny_checkpoint), prior, tmp_path / "prior")
    assert "is already finished" in capsys.readouterr().out

    recipe = dreambooth_recipe(tiny_checkpoint, tmp_path / "dog", prior=prior)
    task = text_to_image.task(recipe, tmp_path)
    batch = task.batch(0)
    assert batch["weights"].tolist() == [1.0, 1.0, 0.5, 0.5]
    of_class = {examples.pixels(i).tobytes() for i in range(3)}
    assert [image.tobytes() in of_class for image in batch["pixels"]] == [False, False, True, True]
    ids = batch["token_ids"]["text_encoder"]
    assert (ids[0] == ids[1]).all()
    assert (ids[2] == ids[3]).all()
    assert (ids[0] != ids[2]).any()


def dreambooth_recipe(model, folder, **changes) -> TextToImageRecipe:
    folder.mkdir()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(folder / "0.png")
    Image.fromarray(np.full((64, 64, 3), 100, np.uint8)).save(folder / "1.png")
    lines = [{"file_name": f"{i}.png", "text": "a red shape"} for i in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TextToImageRecipe(
        objective="text_to_image",
        steps=1,
        batch_size=2,
        optimizer=Optimizer(1e-3),
        model=str(model),
        caption_dropout=0.0,
        **{"data": Data(path=str(folder)), **changes},
    )


def test_prior_requires_square_images(tiny_checkpoint, tmp_path):
    buckets = Data(path=str(tmp_path / "dog"), aspect_ratios=2.0)
    recipe = dreambooth_recipe(
        tiny_checkpoint, tmp_path / "dog", prior=Prior("a shape"), data=buckets
    )
    with pytest.raises(InputError, match=r"prior requires .* data.aspect_ratios = 1"):
        text_to_image.task(recipe, tmp_path)


def test_class_images_need_a_model_and_a_number(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="the recipe has no model"):
        class_images.class_images("", Prior(prompt="a shape"), tmp_path)
    with pytest.raises(InputError, match="num_images must be a whole number"):
        class_images.class_images(str(tiny_checkpoint), Prior("a shape", 0), tmp_path / "none")
