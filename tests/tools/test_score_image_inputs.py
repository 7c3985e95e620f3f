"""The scores of the bundled ControlNet and of inpainting, on a few scenes."""

import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.worlds.shapes import Object, Scene
from tools import score_image_inputs as scores


def scored(capsys, *arguments: str) -> list[int]:
    scores.main([*arguments, "--scenes", "16"])
    return [int(number) for number in re.findall(r": (\d+) of 16", capsys.readouterr().out)]


@pytest.mark.slow  # it generates and judges
def test_the_bundled_controlnet_follows_outlines(capsys, tmp_path):
    """Its whole run is in docs/training.md: 93% of 400."""
    places, captions = scored(
        capsys,
        "outlines",
        "--controlnet",
        "shapes64-outlines",
        "--picture",
        str(tmp_path / "a.png"),
    )
    assert places >= 12
    assert captions >= 12
    assert Image.open(tmp_path / "a.png").size == (2 * (16 * 66 - 2), 2 * (2 * 66 - 2))


@pytest.mark.slow
def test_what_a_mask_leaves_visible_is_unchanged(capsys):
    assert scored(capsys, "inpainting")[1] == 16


def test_an_object_is_in_its_place_within_3_pixels_and_alone():
    wanted = Scene("gray", (Object("star", "red", 20.0, 20.0, 15.0),))

    def found(*things: Object) -> bool:
        return scores.is_in_place(wanted, Scene("white", things))

    assert found(Object("star", "blue", 22.0, 22.0, 18.0))
    assert not found(Object("star", "red", 22.5, 22.5, 15.0))
    assert not found(Object("ring", "red", 20.0, 20.0, 15.0))
    assert not found(*[Object("star", "red", 20.0, 20.0, 15.0)] * 2)
    assert not found()


def test_hidden_objects_are_apart_from_the_others():
    for seed in range(20):
        trial = scores.repainted(np.random.default_rng(seed), seed)
        mask, image = trial.request.mask_image, trial.request.image
        ground = image[0, 0]
        assert (image[~mask] != ground).any() == (len(trial.scene.objects) == 2)
        assert (image[mask] != ground).any()
