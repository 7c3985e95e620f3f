"""A seventh shape: its images can be trained on, and generated ones are counted."""

import json
from pathlib import Path

import making
import numpy as np
import pytest

from jaxdiff.dataset import ledger
from jaxdiff.dataset import shard as shards
from jaxdiff.training import data
from jaxdiff.training.recipe import Data
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import HEART, SHAPES
from tools import draw_shape


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("shape") / "hearts"
    draw_shape.write_images(directory)
    return directory


def test_each_image_is_a_captioned_heart_that_the_shapes_world_does_not_recognise(images):
    examples = data.open_examples(Data(path=str(images)))
    assert len(examples) == draw_shape.TAUGHT == len(set(examples.captions))
    for number in range(len(examples)):
        pixels = examples.pixels(number)
        (heart,) = shapes.read(pixels, (*SHAPES, HEART)).objects
        (unknown,) = shapes.read(pixels).objects
        assert heart.shape == HEART
        assert unknown.shape is None
        assert f"{heart.color} heart on a " in examples.captions[number]


def test_four_of_the_prompts_are_of_untrained_pairs(images):
    rows = list(draw_shape.manifest_rows(4))
    trained = {row["prompt"] for row in rows if row["taught"]}
    captions = (images / "metadata.jsonl").read_text().splitlines()
    assert trained == {json.loads(line)["text"] for line in captions}
    assert len(rows) - len(trained) == 4


def test_only_hearts_are_counted(tiny_checkpoint, tmp_path):
    manifest, directory = tmp_path / "rows.jsonl", tmp_path / "made"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in draw_shape.manifest_rows(1)))
    directory.mkdir()
    run = making.make_plan(directory, manifest, tiny_checkpoint, width=64, height=64)
    rng = np.random.default_rng(0)
    with shards.Attempt(run, 0) as attempt:
        for number, image in enumerate(run.planned(0)):
            shown = draw_shape.caption(*draw_shape.pairs()[number])
            if number == 0:
                attempt.add_failed(image, "not finite")
                continue
            if number == 23:  # one of the untrained pairs
                shown = shapes.Caption((shapes.Group("circle", "red"),))
            pixels = shapes.render(shapes.scene_for(shown, rng))
            attempt.add(shards.encode(image, pixels, run.plan))
        attempt.commit(making.FACTS)
    ledger.settle(run)
    ledger.finalize(run, 0.0)
    assert list(draw_shape.score(directory)) == [
        "taught pairs: 19 of 20 images are right",
        "unseen pairs: 3 of 4 images are right",
        "22 of 24 images show a heart",
        "  not made: 1",
        "  wrong shape: 1",
    ]
