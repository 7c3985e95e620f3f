"""Rows that edit images by instruction: what they need, and what records say of them."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset.finished import gallery
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble
from jaxdiff.families.operations import evaluations
from jaxdiff.request import Options

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def model(editing_checkpoint) -> jaxdiff.TextToImage:
    return jaxdiff.load(editing_checkpoint)


def picture(seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC))


def edit(seed: int = 0, **changes) -> jaxdiff.Request:
    usual = {"prompt": "a star", "steps": 3, "guidance_scale": 4.0, "image": picture(seed)}
    return jaxdiff.Request(seed=seed, **{**usual, **changes})


def test_the_source_and_its_guidance_change_an_image_and_neighbours_do_not(model):
    asked = [edit(0), edit(1, image_guidance_scale=3.0), edit(2)]
    images = model.generate(asked)
    assert [image.request.image_guidance_scale for image in images] == [1.5, 3.0, 1.5]
    changed = [
        edit(0),
        edit(0, image=picture(7)),
        edit(0, image_guidance_scale=3.0),
        edit(0, prompt="a ring"),
        edit(0, negative_prompt="a ring"),
    ]
    same, *others = model.generate(changed)
    np.testing.assert_array_equal(same.pixels, images[0].pixels)
    (alone,) = model.generate([images[1].request])
    np.testing.assert_array_equal(alone.pixels, images[1].pixels)
    for image in others:
        assert (image.pixels != images[0].pixels).any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": None}, "this model edits images: give it image"),
        ({"mask_image": np.ones((64, 64), bool)}, "edits whole images; leave mask_image out"),
        ({"outpaint": (8, 0, 0, 0)}, "edits whole images; leave outpaint out"),
        ({"strength": 0.5}, "edits images in all steps; leave strength out"),
        ({"image_guidance_scale": -1}, "image_guidance_scale must be a number from 0"),
    ],
)
def test_a_bad_request_is_refused(model, changes, reason):
    with pytest.raises(InputError, match=reason):
        model.resolve(edit(**changes))


@pytest.mark.parametrize("changes", [{}, {"image": None}])
def test_other_models_take_no_image_guidance(tiny_checkpoint, changes):
    ensemble = open_ensemble(tiny_checkpoint)
    request = edit(image_guidance_scale=2.0, **changes)
    with pytest.raises(ValueError, match="image_guidance_scale has no effect on this model"):
        ensemble.with_images(request)


def test_guided_steps_have_three_evaluations(model, editing_checkpoint):
    ensemble = open_ensemble(editing_checkpoint)
    for scales, expected in (({}, 9), ({"image_guidance_scale": 0.9}, 3)):
        bucket = model.resolve(edit(**scales)).bucket
        assert evaluations(ensemble, Options(), ensemble.steps(Options(), bucket)) == [
            (expected, 0)
        ]


def test_what_would_not_see_the_image_is_refused(editing_checkpoint, tiny_checkpoint):
    with pytest.raises(InputError, match="not with InstructPix2Pix"):
        open_ensemble(editing_checkpoint, controlnet=["net"])
    with pytest.raises(InputError, match="--refiner cannot continue what InstructPix2Pix begins"):
        open_ensemble(editing_checkpoint, refiner=tiny_checkpoint)


@pytest.mark.usefixtures("noisy")
def test_records_have_the_column_only_if_a_row_has_a_value(
    generate, tmp_path, editing_checkpoint, capsys
):
    for seed in (0, 1):
        Image.fromarray(picture(seed)).save(tmp_path / f"{seed}.png")
    rows = [
        {"image": "0.png", "Image CFG scale": 2},
        {"image": "1.png"},
        {"image": "1.png", "image_guidance_scale": 0.5},
        {},
    ]
    assert generate(rows, "--dry-run", model=editing_checkpoint) == 0
    assert "image, 1" in capsys.readouterr().out
    assert generate(rows, model=editing_checkpoint) == 0
    found = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    by_scale = {row["image_guidance_scale"]: row["init_image"] for row in found}
    assert by_scale == {2.0: "0.png", 1.5: "1.png", 0.5: "1.png"}
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    gallery.write(tmp_path / "out")
    assert generate([{"image": "0.png"}], output="other") == 0
    (row,) = pq.read_table(tmp_path / "other" / "metadata").to_pylist()
    assert "image_guidance_scale" not in row
    assert open_run(tmp_path / "other").plan.later_columns == []
    gallery.write(tmp_path / "other")
    assert cli.main(["inspect", str(editing_checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "InstructPix2Pix" in said
    assert "7.5, and 1.5 for the image" in said
