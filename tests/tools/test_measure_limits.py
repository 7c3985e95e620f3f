"""The measurement of the limits, on drawn scenes with known answers and once with a model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.training.recipe import Data, Optimizer, TextToImageRecipe
from jaxdiff.training.shapes import scenes
from jaxdiff.worlds import shapes
from tools import measure_limits as limits

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
DATA = Data(scenes=40)
RECIPE = TextToImageRecipe(
    objective="text_to_image", steps=1, batch_size=1, optimizer=Optimizer(1e-3), seed=5, data=DATA
)
SIZES = limits.Sizes(counting=1, binding=1, held_out=1, memory=2)


def drawn(*kinds) -> np.ndarray:
    """Draws an image of objects, given as "color shape", each in a corner of its own."""
    things = tuple(
        shapes.Object(
            kind.split()[1], kind.split()[0], 16.0 + 32 * (i % 2), 16.0 + 32 * (i // 2), 20.0
        )
        for i, kind in enumerate(kinds)
    )
    return shapes.render(shapes.Scene("white", things))


def row(*groups: shapes.Group) -> dict:
    return shapes.row_for(shapes.Caption(groups))


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (["red circle", "blue star"], "right"),
        (["blue star", "red circle"], "right"),
        (["blue circle", "red star"], "colors swapped"),
        (["blue circle", "blue star"], "other colors"),
        (["blue star"], "one missing"),
        (["red circle", "blue star", "red circle"], "one too many"),
        (["red circle", "blue ring"], "other"),
        ([], "other"),
    ],
)
def test_images_of_two_colored_objects_are_classified(seen, outcome):
    wanted = row(shapes.Group("circle", "red"), shapes.Group("star", "blue"))
    assert limits.binding(wanted, drawn(*seen)) == outcome
    assert outcome in limits.BINDINGS


def test_requested_and_seen_objects_are_counted():
    made = [
        (row(shapes.Group("ring", "red", asked)), drawn(*["red ring"] * seen))
        for asked, seen in ((1, 1), (3, 2), (3, 3), (3, 4))
    ]
    counts = limits.confusion(made)
    assert counts.shape == (5, limits.MOST_SEEN + 1)
    assert counts[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert counts[2].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert counts.sum() == 4


def test_pairs_are_counted_by_their_correct_properties():
    wanted = row(shapes.Group("ring", "red"))
    pictures = [
        drawn(*kinds) for kinds in (["red ring"], ["red star"], ["blue ring"], ["red ring"] * 2)
    ]
    counted = limits.pair_counts([(wanted, pixels) for pixels in pictures])
    assert counted == {
        "pairs": 1,
        "images": 4,
        "right": 1,
        "one object": 3,
        "its shape": 2,
        "its color": 2,
    }


def test_the_nearest_training_scene_is_found(monkeypatch):
    monkeypatch.setattr(limits, "BLOCK", 16)  # makes the last block shorter
    known = shapes.render(scenes.draw(DATA, 5, 37)[0])
    shifted = np.where(known > 250, known, known + 3).astype(np.uint8)
    distances, nearest = limits.nearest_scenes(np.stack([known, shifted]), DATA, 5)
    assert nearest.tolist() == [37, 37]
    np.testing.assert_allclose(distances, [0.0, 3.0], atol=0.1)


def test_held_out_pairs_are_requested_as_often_as_the_others():
    held_out = ("red circle", "pink square")
    rows = list(limits.held_out_rows(held_out, 20))
    asked = {
        name: [r["prompt"] for r in rows if r["limit"] == name] for name in ("held_out", "shown")
    }
    assert set(asked["held_out"]) == {"a red circle", "a pink square"}
    assert len(asked["held_out"]) == len(asked["shown"]) == 40
    assert not set(asked["held_out"]) & set(asked["shown"])


def test_every_number_is_requested_and_pairs_differ_in_color_and_shape():
    rows = list(limits.limit_rows(SIZES, seed=1))
    assert [r["include"][0]["count"] for r in rows if r["limit"] == "counting"] == [1, 2, 3, 4, 5]
    for first, second in (r["include"] for r in rows if r["limit"] == "binding"):
        assert first["class"] != second["class"]
        assert first["color"] != second["color"]
    assert rows == list(limits.limit_rows(SIZES, seed=1))


@pytest.mark.slow  # it generates with every setting
def test_a_model_is_measured(tiny_checkpoint, tmp_path):
    found = limits.measure(str(tiny_checkpoint), RECIPE, tmp_path, SIZES)
    ring = [(row(shapes.Group("ring", "red")), drawn("red ring"))]
    found |= {"held_out": limits.pair_counts(ring), "shown": limits.pair_counts(ring)}
    assert np.sum(found["counting"]) == 5
    assert sum(found["binding"].values()) == 1
    memory = found["memorisation"]
    assert memory["generated"]["images"] == memory["fresh"]["images"] == 2
    assert memory["generated"]["least"] > 0
    for name in ("counting", "memorisation", "closest"):
        assert Image.open(tmp_path / f"{name}.png").width > 100
        assert (tmp_path / f"{name}.png").stat().st_size < 100_000
    text = limits.tables(json.loads(json.dumps(found)))
    assert "| held out | 1 | 1 | 1 | 1 | 1 | 1 | 100.0% |" in text


def test_a_recipe_for_other_data_gives_a_one_line_error(capsys, tmp_path):
    recipe = str(CONFIGS / "shapes64-autoencoder.toml")
    assert limits.main(["--recipe", recipe, "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert recipe in line


def test_the_committed_recipe_holds_pairs_out():
    held_out = limits.text_to_image_recipe(CONFIGS / "held-out.toml").data.held_out
    assert len(held_out) == 8
    with pytest.raises(InputError, match="recipe file not found"):
        limits.text_to_image_recipe(CONFIGS / "none.toml")
