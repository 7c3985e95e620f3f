"""The auxiliary task in the shapes world: predicting each shape's place."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_denoising import recipe

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.training import text_to_image
from jaxdiff.training.recipe import Data, Loss
from jaxdiff.training.shapes import places
from jaxdiff.worlds.shapes import SHAPES, Object, Scene

pytestmark = pytest.mark.usefixtures("compiled_faster")


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


def test_the_blobs_of_the_nearest_objects_stay_apart():
    pair = [Object("circle", "red", x, 32.0, 14.0) for x in (24.0, 40.0)]
    (found,) = places.maps([Scene("white", tuple(pair))], 16)
    row = found[7, :, SHAPES.index("circle")]
    assert row[8] < 0.3 * min(row[6], row[10])


@pytest.fixture(scope="module")
def with_places(tiny_checkpoint):
    data, loss = Data(scenes=64), Loss(places=0.5)
    return dataclasses.replace(recipe(tiny_checkpoint, ""), data=data, loss=loss)


def test_the_task_adds_a_loss_and_is_not_exported(with_places, tmp_path):
    task = text_to_image.task(with_places, tmp_path)
    batch = task.batch(0)
    loss, logged = compilation.jit(task.loss)(task.params, task.frozen, batch, jax.random.key(0))
    of_zeros = np.mean((places.SCALE * batch["places"]) ** 2)
    sums, counts = np.asarray(logged["by_noise_level"])
    np.testing.assert_allclose(logged["places"], of_zeros, rtol=1e-5)
    np.testing.assert_allclose(loss, sums.sum() / counts.sum() + 0.5 * of_zeros, rtol=1e-5)

    task.export(task.params, task.frozen, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())
    assert config["out_channels"] == config["in_channels"] == 4
    assert places.narrowed(task.params["unet"], 4)["conv_out"]["bias"].shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data(path="photos")}, "loss.places requires the shapes world"),
        ({"method": "lora"}, 'loss.places requires method = "full"'),
        ({"train": ("text_encoder",)}, "loss.places requires .* the denoiser in train"),
    ],
)
def test_the_task_is_rejected_where_it_does_not_apply(with_places, tmp_path, change, message):
    changed = dataclasses.replace(with_places, **change)
    with pytest.raises(InputError, match=message):
        text_to_image.task(changed, tmp_path)
