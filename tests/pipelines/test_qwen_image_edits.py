"""Qwen-Image-Edit, whose text encoder sees the image of a row beside its prompt."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_families
from safetensors.numpy import load_file, save_file
from test_images_in import picture

import jaxdiff
from jaxdiff import cli
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.opening import open_ensemble
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint
from jaxdiff.training import consistency, text_to_image
from jaxdiff.training.recipe import ConsistencyRecipe, Data, Optimizer, TextToImageRecipe

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Returns a small checkpoint, which no test may modify."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return small_families.save(small_families.QWEN_IMAGE_EDIT, folder)


@pytest.fixture(scope="module")
def model(checkpoint) -> jaxdiff.TextToImage:
    return jaxdiff.load(checkpoint)


def edit(seed: int = 0, **changes) -> jaxdiff.Request:
    usual = {"prompt": "a star", "steps": 2, "guidance_scale": 4.0, "width": 128, "height": 64}
    usual["image"] = np.asarray(picture(seed, (128, 64)))
    return jaxdiff.Request(seed=seed, **{**usual, **changes})


def test_prompt_and_image_are_seen_together_and_neighbours_change_nothing(model):
    first, second = np.asarray(picture(0, (128, 64))), np.asarray(picture(1, (128, 64)))
    asked = [
        edit(image=image, prompt=prompt)
        for image in (first, second)
        for prompt in ("a star", "a ring")
    ]
    images = [image.pixels for image in model.generate(asked)]
    assert len({pixels.tobytes() for pixels in images}) == 4
    for image, pixels in zip(model.generate(asked[:0:-2]), images[:0:-2], strict=True):
        np.testing.assert_array_equal(image.pixels, pixels)
    encoder = model._sampler._denoisers[0].prompts
    assert [len(encoder._cache[negative]) for negative in (False, True)] == [4, 2]
    texts = encoder(["a star"] * 2, images=[first, second])
    assert (np.asarray(texts[0].context) != np.asarray(texts[1].context)).any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": None}, "this model edits images: give it image"),
        ({"mask_image": np.ones((64, 128), bool)}, "edits whole images; leave mask_image out"),
        ({"strength": 0.5}, "edits images in all steps; leave strength out"),
        ({"image_guidance_scale": 2}, "image_guidance_scale has no effect on this model"),
    ],
)
def test_a_bad_request_is_refused(model, changes, reason):
    with pytest.raises(InputError, match=reason):
        model.resolve(edit(**changes))


@pytest.mark.usefixtures("noisy")
def test_rows_without_an_image_are_rejected(generate, tmp_path, checkpoint):
    picture(0, (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    rows = [{"id": name, "image": name} for name in ("0.png", "broken.png")]
    options = ("--width=256", "--height=128", "--guidance-scale=1", "--steps=2")
    assert generate([*rows, {"id": "none"}], *options, model=checkpoint) == 0
    (row,) = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    assert row["init_image"] == "0.png"
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "edits images: give it image" in rejected
    assert "broken.png" in rejected
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_it_is_neither_trained_nor_a_teacher(checkpoint, tmp_path):
    given = {"steps": 1, "batch_size": 1, "optimizer": Optimizer(1e-3)}
    given |= {"model": str(checkpoint)}
    recipe = TextToImageRecipe(objective="text_to_image", data=Data(scenes=8), **given)
    with pytest.raises(InputError, match="training such models is not built; train one that"):
        text_to_image.task(recipe, tmp_path)
    student = ConsistencyRecipe(objective="consistency", **given)
    with pytest.raises(InputError, match="edits images; use another teacher"):
        consistency.task(student)


@pytest.mark.parametrize("pipeline", ["QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
def test_its_relatives_are_refused_in_a_line(checkpoint, tmp_path, pipeline):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": pipeline}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{pipeline}' is not supported; use a checkpoint of"):
        open_checkpoint(folder)


def test_every_weight_of_the_vision_tower_is_read(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    ours = {key.removeprefix("model."): value for key, value in weights.items()}
    assert open_checkpoint(folder).weights("text_encoder").keys() == ours.keys()
    older = {key if key.startswith("visual.") else f"model.{key}": ours[key] for key in ours}
    save_file(older, file)  # as in the published checkpoint
    assert open_checkpoint(folder).weights("text_encoder").keys() == ours.keys()
    weights["visual.more"] = weights.pop("model.visual.merger.ln_q.weight")
    save_file(weights, file)
    expected = r"missing \(visual\.merger\.ln_q\.weight\); 1 unknown \(visual\.more\)"
    with pytest.raises(InputError, match=expected):
        jaxdiff.load(folder)


def test_a_tower_with_more_layers_than_weights_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["depth"] = 10**6
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="depth = 1000000 describes more modules than the"):
        jaxdiff.load(folder)


def test_a_tokenizer_without_a_token_for_images_is_refused(tmp_path):
    small = small_families.QWEN_IMAGE_EDIT
    config = replace(small.configs["text_encoder"], image_token_id=265)
    folder = small_families.save(
        replace(small, configs=small.configs | {"text_encoder": config}), tmp_path / "model"
    )
    with pytest.raises(InputError, match="makes no token 265, in whose place text_encoder sees"):
        of_checkpoint(open_checkpoint(folder))


def test_what_would_not_see_the_image_is_refused(checkpoint, tiny_checkpoint):
    with pytest.raises(InputError, match="not with Qwen-Image-Edit"):
        open_ensemble(checkpoint, controlnet=["net"])
    with pytest.raises(InputError, match="--refiner cannot continue what Qwen-Image-Edit begins"):
        open_ensemble(checkpoint, refiner=tiny_checkpoint)


def test_both_images_count_as_tokens(checkpoint):
    opened = open_checkpoint(checkpoint)
    family = small_families.FAMILIES["QwenImagePipeline"]
    seen = 2 * 2 - 1  # tokens instead of the one in its place
    (both, _), (one, _), (twice, _) = (
        each.operations(opened, height, 8, tokens)
        for each, height, tokens in (
            (opened.family, 8, 512),
            (family, 8, 512 + seen),
            (family, 16, 512 + seen),
        )
    )
    assert one < both < twice  # the output is of one image
