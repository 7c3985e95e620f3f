import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jaxdiff.dataset import image_files

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
AWKWARD = [
    "一只红色的猫, قطة حمراء, 👩\u200d👩\u200d👧",
    '<a> & ]]> {} <!-- ?> &#0; "quoted"',
    "\x01\x08\x0b\x1f\x7f\x85\x9f \t\r\n \u2028\ufeff\ufffe\uffff\U0001fffe\U0010ffff",
]
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PARAMETERS = (
    f"{PROMPT}\nNegative prompt: blur\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 5, Seed: 7, "
    "Size: 24x16, Model hash: 0123456789"
)


def opened(image_format: str, settings: dict = SETTINGS) -> Image.Image:
    image = Image.open(io.BytesIO(image_files.encode(PIXELS, settings, image_format)))
    image.load()
    return image


def test_png_stores_the_settings_in_itxt():
    text = opened("png").text
    assert text["Description"] == PROMPT
    assert text["parameters"] == PARAMETERS
    assert json.loads(text["jaxdiff"]) == SETTINGS


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webp_and_jpeg_store_the_settings_in_exif(image_format):
    image = opened(image_format)
    comment = image.getexif().get_ifd(image_files.EXIF_IFD)[image_files.USER_COMMENT]
    assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    description = image.getexif()[image_files.IMAGE_DESCRIPTION]
    assert description.encode("latin-1").decode() == PROMPT  # Pillow reads it as Latin-1


@pytest.mark.parametrize("text", AWKWARD)
def test_png_keeps_text_of_every_script(text):
    kept = opened("png", {**SETTINGS, "prompt": text, "negative_prompt": text}).text
    assert kept["Description"] == text
    assert kept["parameters"] == PARAMETERS.replace(PROMPT, text).replace(": blur", f": {text}")
    assert json.loads(kept["jaxdiff"])["prompt"] == text
    assert type(kept["parameters"]) is PngImagePlugin.iTXt


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_webp_and_jpeg_keep_text_of_every_script(image_format, text):
    settings = {**SETTINGS, "prompt": text, "negative_prompt": text}
    image = opened(image_format, settings)
    comment = image.getexif().get_ifd(image_files.EXIF_IFD)[image_files.USER_COMMENT]
    parameters = comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert parameters == PARAMETERS.replace(PROMPT, text).replace(": blur", f": {text}")
    (found,) = ElementTree.fromstring(image.info["xmp"].decode()).iter("{urn:jaxdiff}settings")
    assert json.loads(found.text) == settings


@pytest.mark.parametrize("text", [PROMPT, *AWKWARD])
@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_every_format_has_the_digital_source_type(image_format, text):
    description = opened(image_format, {**SETTINGS, "prompt": text}).getxmp()["xmpmeta"]["RDF"]
    assert description["Description"]["DigitalSourceType"] == SOURCE_TYPE


@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_the_longest_prompts_fit_into_every_format(image_format):
    long = {**SETTINGS, "prompt": "🌟" * 4000, "negative_prompt": "🌟" * 4000}
    assert opened(image_format, long).size == (24, 16)
    escaped = {**SETTINGS, "prompt": "\x01&" * 2000, "negative_prompt": "\x01&" * 2000}
    assert opened(image_format, escaped).size == (24, 16)


@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_equal_images_are_equal_bytes(image_format):
    first, second = (image_files.encode(PIXELS, SETTINGS, image_format) for _ in range(2))
    assert first == second
    decoded = image_files.decode(first)
    if image_format in image_files.LOSSLESS:
        assert (decoded == PIXELS).all()
    else:  # noise is the hardest case for JPEG
        assert np.abs(decoded.astype(int) - PIXELS).mean() < 8


def test_pixel_sha256_depends_on_the_pixels_alone():
    identity = image_files.pixel_sha256(PIXELS)
    assert identity == image_files.pixel_sha256(np.asfortranarray(PIXELS))
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    assert image_files.pixel_sha256(changed) != identity


@pytest.mark.parametrize("image_format", image_files.LOSSLESS)
def test_a_damaged_image_raises_a_one_line_value_error(image_format):
    content = image_files.encode(PIXELS, SETTINGS, image_format)
    random = np.random.default_rng(1)
    reasons = []
    for _ in range(300):
        damaged = bytearray(content[: random.integers(len(content) + 1)])
        for at in random.integers(max(len(damaged), 1), size=random.integers(4)):
            damaged[at : at + 1] = random.bytes(1)
        try:
            image_files.decode(bytes(damaged))
        except ValueError as problem:
            reasons.append(str(problem))
    assert len(reasons) > 100
    assert not any("\n" in reason for reason in reasons)


def test_a_huge_image_is_not_decoded(monkeypatch):
    content = image_files.encode(PIXELS, SETTINGS, "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        image_files.decode(content)


def test_other_formats_are_not_decoded():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "gif")
    with pytest.raises(ValueError, match="not a readable image"):
        image_files.decode(file.getvalue())
