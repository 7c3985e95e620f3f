import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from jaxdiff.dataset import images

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PROMPT = 'ein "grüner" Stern 🌟\nzweite Zeile'
SETTINGS = {
    "prompt": PROMPT,
    "negative_prompt": "blur",
    "seed": 7,
    "width": 24,
    "height": 16,
    "steps": 20,
    "guidance_scale": 5.0,
    "sampler": "dpmpp_2m",
    "model": "0123456789abcdef",
}
PARAMETERS = (
    f"{PROMPT}\nNegative prompt: blur\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 5, Seed: 7, "
    "Size: 24x16, Model hash: 0123456789"
)


def opened(image_format: str, settings: dict = SETTINGS) -> Image.Image:
    image = Image.open(io.BytesIO(images.encode(PIXELS, settings, image_format)))
    image.load()
    return image


def test_png_says_in_itxt_how_it_was_made():
    text = opened("png").text
    assert text["Description"] == PROMPT
    assert text["parameters"] == PARAMETERS
    assert json.loads(text["jaxdiff"]) == SETTINGS


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webp_and_jpeg_say_in_exif_how_they_were_made(image_format):
    image = opened(image_format)
    comment = image.getexif().get_ifd(images.EXIF_IFD)[images.USER_COMMENT]
    assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    description = image.getexif()[images.IMAGE_DESCRIPTION]
    assert description.encode("latin-1").decode() == PROMPT  # Pillow reads it as Latin-1


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webp_and_jpeg_hold_every_setting_in_xmp(image_format):
    awkward = {**SETTINGS, "negative_prompt": "<a> & ]]> {} \x01"}
    packet = opened(image_format, awkward).info["xmp"]
    (found,) = ElementTree.fromstring(packet.decode()).iter("{urn:jaxdiff}settings")
    assert json.loads(found.text) == awkward


@pytest.mark.parametrize("image_format", images.EXTENSIONS)
def test_every_format_is_marked_as_made_by_an_algorithm(image_format):
    packet = opened(image_format).info["xmp"]
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in packet


@pytest.mark.parametrize("image_format", images.EXTENSIONS)
def test_the_longest_prompts_fit_into_every_format(image_format):
    long = {**SETTINGS, "prompt": "🌟" * 4000, "negative_prompt": "🌟" * 4000}
    assert opened(image_format, long).size == (24, 16)
    escaped = {**SETTINGS, "prompt": "\x01&" * 2000, "negative_prompt": "\x01&" * 2000}
    assert opened(image_format, escaped).size == (24, 16)


@pytest.mark.parametrize("image_format", images.EXTENSIONS)
def test_equal_images_are_equal_bytes(image_format):
    first, second = (images.encode(PIXELS, SETTINGS, image_format) for _ in range(2))
    assert first == second
    decoded = images.decode(first)
    if image_format in images.LOSSLESS:
        assert (decoded == PIXELS).all()
    else:  # noise is the hardest case for JPEG
        assert np.abs(decoded.astype(int) - PIXELS).mean() < 8


def test_pixels_have_an_identity_of_their_own():
    identity = images.pixel_sha256(PIXELS)
    assert identity == images.pixel_sha256(np.asfortranarray(PIXELS))
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    assert images.pixel_sha256(changed) != identity
