"""The second task in the shapes world: to tell where each shape lies."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_denoising import recipe

from jaxdiff.errors import InputError
from jaxdiff.training import text_to_image
from jaxdiff.training.recipe import Data, Loss
from jaxdiff.training.shapes import places
from jaxdiff.worlds.shapes import SHAPES, Object, Scene

pytestmark = pytest.mark.usefixtures("compiled_fast")


def test_a_map_has_its_peaks_where_the_objects_are_and_nothing_elsewhere():
    ring, star = Object("ring", "red", 14.0, 46.0, 20.0), Object("star", "blue", 50.0, 18.0, 20.0)
    (found,) = places.maps([Scene("white", (ring, star))], 16)
    peaks = {
        name: np.unravel_index(found[..., channel].argmax(), (16, 16))
        for channel, name in enumerate(SHAPES)
        if found[..., channel].any()
    }
    assert peaks == {"ring": (11, 3), "star": (4, 12)}
    assert found.max() == 1.0
    assert found[..., SHAPES.index("ring")][4, 12] < 1e-6


def test_objects_as_near_as_they_come_stay_apart():
    pair = [Object("circle", "red", x, 32.0, 14.0) for x in (24.0, 40.0)]
    (found,) = places.maps([Scene("white", tuple(pair))], 16)
    row = found[7, :, SHAPES.index("circle")]
    assert row[8] < 0.3 * min(row[6], row[10])


@pytest.fixture(scope="module")
def asked(tiny_checkpoint):
    data, loss = Data(scenes=64), Loss(places=0.5)
    return dataclasses.replace(recipe(tiny_checkpoint, ""), data=data, loss=loss)


def test_the_task_is_learned_beside_the_noise_and_left_out_of_the_model(asked, tmp_path):
    task = text_to_image.task(asked, tmp_path)
    batch = task.batch(0)
    loss, logged = jax.jit(task.loss)(task.params, task.frozen, batch, jax.random.key(0))
    nothing_said = np.mean((places.SCALE * batch["places"]) ** 2)
    sums, counts = np.asarray(logged["by_noise_level"])
    np.testing.assert_allclose(logged["places"], nothing_said, rtol=1e-5)
    np.testing.assert_allclose(loss, sums.sum() / counts.sum() + 0.5 * nothing_said, rtol=1e-5)

    task.export(task.params, task.frozen, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())
    assert config["out_channels"] == config["in_channels"] == 4
    assert places.narrowed(task.params["unet"])["conv_out"]["bias"].shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data(path="photos")}, "loss.places: is known of the shapes world only"),
        ({"method": "lora"}, "loss.places: is for a whole U-Net"),
        ({"train": ("text_encoder",)}, "loss.places: is for a whole U-Net"),
    ],
)
def test_it_is_refused_where_it_makes_no_sense(asked, tmp_path, change, message):
    said = dataclasses.replace(asked, **change)
    with pytest.raises(InputError, match=message):
        text_to_image.task(said, tmp_path)
