"""Every kind of image file decodes to upright 8-bit pixels, or is named in an error."""

import io
import struct

import numpy as np
import pytest
from pictures import animated, encoded, noise, png
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.images import decoding

EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6  # to be rotated clockwise


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_lossless_files_decode_to_their_pixels(kind):
    pixels = noise(5, 7)
    content = encoded(pixels, kind, **({"lossless": True} if kind == "webp" else {}))
    assert decoding.read_size(io.BytesIO(content), "a") == (5, 7)
    np.testing.assert_array_equal(decoding.decode(content, "a"), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode):
    kind = "jpeg" if mode == "CMYK" else "png"
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    pixels = decoding.decode(encoded(white, kind), "a")
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.all(pixels == 255)


def test_cmyk_colors_are_converted():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    np.testing.assert_allclose(
        decoding.decode(encoded(cyan, "jpeg"), "a")[8, 8].astype(int), (0, 255, 255), atol=3
    )


def test_transparent_pixels_are_white_in_images_and_black_in_greys():
    clear = encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))
    assert np.all(decoding.decode(clear, "a") == 255)
    assert np.all(decoding.decode_grey(clear, "a") == 0)
    half = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))
    np.testing.assert_allclose(decoding.decode(half, "a")[0, 0], (255, 127, 127), atol=1)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0] * 768)
    assert np.all(decoding.decode(encoded(palette, transparency=3), "a") == 255)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparent_pixels_are_kept_as_they_are_stored(kind):
    pixels = np.dstack([noise(5, 7), np.full((5, 7), 255, np.uint8)])
    how = {"lossless": True, "exact": True} if kind == "webp" else {}
    assert decoding.decode_rgba(encoded(pixels, kind, **how), "a") is None
    assert decoding.decode_rgba(encoded(pixels[..., :3], kind, **how), "a") is None
    pixels[1:3, 2:4, 3] = 0, 200
    content = encoded(pixels, kind, **how)
    np.testing.assert_array_equal(decoding.decode_rgba(content, "a"), pixels)
    turned = decoding.decode_rgba(encoded(pixels, kind, exif=EXIF_TURNED, **how), "a")
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


def test_every_kind_of_transparency_is_kept():
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([9] * 768)
    for content, color in [
        (encoded(palette, transparency=3), (9, 9, 9, 0)),
        (encoded(Image.new("LA", (2, 2), (7, 99))), (7, 7, 7, 99)),
        (encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)), (1, 2, 3, 0)),
    ]:
        assert (decoding.decode_rgba(content, "a") == color).all()
    with pytest.raises(InputError, match="a is not a readable image"):
        decoding.decode_rgba(b"no image", "a")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_images_are_upright(kind):
    left_half = np.zeros((16, 32, 3), np.uint8)
    left_half[:, :16] = 255
    content = encoded(left_half, kind, exif=EXIF_TURNED)
    assert decoding.read_size(io.BytesIO(content), "a") == (32, 16)
    for pixels in (decoding.decode(content, "a"), decoding.decode_grey(content, "a")):
        assert pixels.shape[:2] == (32, 16)
        assert pixels[:12].min() > 200  # the left side is now on top
        assert pixels[20:].max() < 50


def test_16_bit_greys_are_refused_and_16_bit_colors_keep_their_high_bytes():
    deep = encoded(Image.new("I;16", (8, 8), 40000))
    for decode in (decoding.decode, decoding.decode_grey):
        with pytest.raises(InputError, match=r"a\.png has I;16 pixels; save it with 8 bits"):
            decode(deep, "a.png")
    row = b"\0" + struct.pack(">3H", 0x1280, 0x3480, 0x56FF)
    np.testing.assert_array_equal(
        decoding.decode(png(1, 1, 16, 2, row), "a"), [[[0x12, 0x34, 0x56]]]
    )


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_animations_are_told_from_stills(kind):
    with pytest.raises(InputError, match=r"a is animated \(3 frames\); save one frame"):
        decoding.check_still(animated(kind), "a")
    decoding.check_still(encoded(noise(8, 8), kind), "a")
    first = decoding.decode(animated(kind), "a")  # as training has always read them
    np.testing.assert_allclose(first[4, 4], (255, 0, 0), atol=3)


def test_a_photograph_with_a_preview_is_a_still():
    photograph = Image.fromarray(noise(32, 32))
    content = encoded(photograph, "mpo", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    decoding.check_still(content, "a")
    assert decoding.decode(content, "a").shape == (32, 32, 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", encoded(noise(32, 32))[:600], encoded(noise(32, 32), "jpeg")[:500]],
    ids=["empty", "text", "truncated png", "truncated jpeg"],
)
def test_what_cannot_be_decoded_is_named(content):
    with pytest.raises(InputError, match=r"^a is not a readable image \(.+\); replace or remove"):
        decoding.decode(content, "a")


@pytest.mark.parametrize("kind", ["gif", "tiff", "ico"])
def test_other_formats_are_not_read(kind):
    with pytest.raises(InputError, match="none of JPEG, PNG, WEBP, BMP"):
        decoding.decode(encoded(noise(16, 16), kind), "a")


def test_a_bomb_is_refused_by_its_header():
    bomb = png(50_000, 50_000, 8, 2, b"")
    side = int(decoding.MOST_PX**0.5) + 8
    large = encoded(Image.new("1", (side, side)))
    for check in (decoding.decode, decoding.decode_grey, decoding.check_still):
        with pytest.raises(InputError, match="a is not a readable image"):
            check(bomb, "a")
        with pytest.raises(InputError, match=f"a has {side}x{side} pixels.*make it smaller"):
            check(large, "a")
