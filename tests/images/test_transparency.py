"""Images with transparent parts: who keeps these, and who sees them on white."""

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image

from jaxdiff.images import loading
from jaxdiff.request import NOT_SAMPLED, Request


@pytest.fixture
def pixels() -> np.ndarray:
    """Returns an image whose lower half is half transparent."""
    opacity = np.full((4, 6), 255, np.uint8)
    opacity[2:] = 128
    return np.dstack([noise(4, 6), opacity])


@pytest.fixture
def ways(pixels, tmp_path) -> list:
    """Returns the image as a file and as an open image."""
    (tmp_path / "a.png").write_bytes(encoded(pixels, "png"))
    return [tmp_path / "a.png", Image.fromarray(pixels)]


def test_gan_upscalers_see_the_pixels_as_they_are_stored(ways, pixels):
    for image in ways:
        request = loading.sized(Request(prompt="", image=image), enlarges=2, multiple=2)
        assert (request.height, request.width) == (8, 12)
        request = loading.prepared(
            Request(prompt="", image=request.image, height=8, width=12, sampler=NOT_SAMPLED),
            enlarges=2,
        )
        np.testing.assert_array_equal(request.image, pixels)


def test_all_other_models_see_transparent_parts_on_white(ways, pixels):
    white = pixels[..., :3] * (pixels[..., 3:] / 255) + 255 - pixels[..., 3:].astype(float)
    for image in ways:
        sized = loading.sized(Request(prompt="", image=image), enlarges=2, multiple=2)
        for enlarges in (1, 2):
            sides = {"height": 4 * enlarges, "width": 6 * enlarges, "sampler": "ddim"}
            request = Request(prompt="", image=sized.image, **sides)
            seen = loading.prepared(request, enlarges=enlarges).image
            assert seen.shape == (4, 6, 3)
            np.testing.assert_allclose(seen, white, atol=1)


def test_opaque_images_have_three_channels(pixels):
    pixels[..., 3] = 255
    for image in (Image.fromarray(pixels), pixels[..., :3]):
        request = Request(prompt="", image=image, height=4, width=6, sampler=NOT_SAMPLED)
        np.testing.assert_array_equal(loading.prepared(request).image, pixels[..., :3])
