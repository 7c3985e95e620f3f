"""Crops lie in the middle or anywhere, without distortion; masks follow their images."""

import numpy as np
import pytest
from pictures import noise

from jaxdiff.images import fitting


def test_crops_are_in_the_middle_or_anywhere_and_never_distorted():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    middle = fitting.fitted(ramp, 50, 50)
    assert middle[:, :, 0].mean() == pytest.approx(99.5, abs=0.5)
    assert fitting.fitted(ramp, 50, 50, (0, 0))[:, :, 0].mean() == pytest.approx(49.5, abs=0.5)
    assert fitting.fitted(ramp, 50, 50, (1, 1))[:, :, 0].mean() == pytest.approx(149.5, abs=0.5)
    steps = np.diff(middle[0, 5:45, 0].astype(int))
    assert steps.mean() == pytest.approx(2, abs=0.05)  # two pixels of the ramp become one


def test_shrinking_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(fitting.fitted(stripes, 16, 16)[4:-4, 4:-4].astype(int)) <= 4


def test_what_has_the_size_already_is_unchanged():
    np.testing.assert_array_equal(fitting.fitted(noise(8, 12), 8, 12), noise(8, 12))
    mask = noise(8, 12)[:, :, 0]
    np.testing.assert_array_equal(fitting.fitted_mask(mask, 8, 12), mask / 255 >= 0.5)


def test_a_mask_is_cropped_as_its_image_is():
    disc = np.hypot(*np.mgrid[-50:50, -100:100]) < 30
    mask = np.where(disc, 255, 0).astype(np.uint8)
    image = np.repeat(mask[:, :, None], 3, axis=2)
    fitted = fitting.fitted_mask(mask, 50, 50)
    assert fitted.dtype == bool
    np.testing.assert_array_equal(fitted, fitting.fitted(image, 50, 50)[:, :, 0] >= 128)
    assert fitted.sum() == pytest.approx(np.pi * 15**2, rel=0.03)


def test_the_borders_of_an_outpainting_repeat_the_edge_and_are_masked():
    pixels = noise(4, 5)
    canvas, mask = fitting.outpainted(pixels, left=1, top=2, right=3, bottom=0)
    assert canvas.shape == (6, 9, 3)
    assert canvas.dtype == np.uint8
    assert mask.shape == (6, 9)
    assert mask.dtype == bool
    np.testing.assert_array_equal(canvas[2:, 1:6], pixels)
    np.testing.assert_array_equal(canvas[0, 1:6], pixels[0])
    np.testing.assert_array_equal(canvas[2:, 8], pixels[:, 4])
    np.testing.assert_array_equal(canvas[0, 0], pixels[0, 0])
    assert not mask[2:, 1:6].any()
    assert mask.sum() == mask.size - 20
