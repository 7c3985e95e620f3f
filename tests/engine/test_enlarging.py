"""Enlarging images: tiles and their seams, sizes, and independence of neighbours."""

import numpy as np
import pytest
from cases import further
from small_upscalers import write_rrdb, write_srvgg

import jaxdiff
from jaxdiff.errors import InputError
from jaxdiff.images import tiles
from jaxdiff.request import Request


@pytest.fixture(scope="module")
def rrdb(tmp_path_factory):
    return jaxdiff.load(write_rrdb(tmp_path_factory.mktemp("rrdb") / "x4.safetensors"))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Returns a random image with large and small shapes."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    fine = random.integers(-20, 20, (height, width, 3))
    large = np.kron(coarse, np.ones((8, 8, 1), int))[:height, :width]
    return np.clip(large + fine, 0, 255).astype(np.uint8)


def enlarged(model, *images: np.ndarray) -> list[np.ndarray]:
    made = model.generate([Request(prompt="", image=image) for image in images])
    assert all(image.finite for image in made)
    return [image.pixels for image in made]


@pytest.mark.parametrize("length", [1, 100, 288, 292, 544, 1000, 1024, 8000])
def test_tiles_cover_an_image_and_share_enough(length):
    starts = tiles.tiling(length, 288).tops
    side = min(length, tiles.SIDE)
    assert starts[0] == 0
    assert starts[-1] + side == length
    steps = np.diff(starts)
    assert (steps <= tiles.SIDE - tiles.OVERLAP).all()
    assert all(start % tiles.MULTIPLE == 0 for start in starts[:-1])
    total = np.zeros(length)
    for start, weights in zip(starts, tiles.weights(starts, side, 1), strict=True):
        total[start : start + side] += weights
        assert start == 0 or not weights[: tiles.MARGIN].any()
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert len(tiles.tiling(1024, 1024).tops) == 4


@pytest.mark.parametrize("scale", [4, 1, further(2)])
def test_seams_are_invisible(scale, tmp_path, monkeypatch):
    model = jaxdiff.load(write_rrdb(tmp_path / "x.safetensors", scale))
    image = picture(320, 352)
    (tiled,) = enlarged(model, image)
    monkeypatch.setattr(tiles, "SIDE", 512)
    assert tiles.tiling(320, 352).count == 1
    (whole,) = enlarged(model, image)
    assert tiled.shape == (320 * scale, 352 * scale, 3)
    assert np.abs(tiled.astype(int) - whole).max() <= 1


def test_an_image_does_not_depend_on_others_or_its_place(rrdb):
    images = [picture(48, 64, seed) for seed in range(11)]
    together = enlarged(rrdb, *images)
    reversed_ = enlarged(rrdb, *images[::-1])[::-1]
    alone = [enlarged(rrdb, image)[0] for image in images]
    for one, other, third in zip(together, reversed_, alone, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, third)


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (63, 65), (290, 31)])
def test_images_of_any_size_are_enlarged(rrdb, size):
    (made,) = enlarged(rrdb, picture(*size))
    assert made.shape == (4 * size[0], 4 * size[1], 3)


def test_images_of_other_sizes_share_a_program(rrdb):
    before = len(rrdb._upscaler._programs)
    enlarged(rrdb, *(picture(190, side) for side in (161, 170, 192)))
    assert len(rrdb._upscaler._programs) == before + 1


def test_a_smaller_factor_resizes(tiny_checkpoint, tmp_path):
    path = write_srvgg(tmp_path / "x.safetensors", scale=4)
    request = Request(prompt="a cat", seed=1, steps=1)
    plain, full, half = (
        jaxdiff.load(tiny_checkpoint, upscale=upscale).generate([request])[0].pixels
        for upscale in (None, path, f"{path}:1.5")
    )
    assert plain.shape == (64, 64, 3)
    assert full.shape == (256, 256, 3)
    assert half.shape == (96, 96, 3)
    (alone,) = enlarged(jaxdiff.load(path), plain)
    np.testing.assert_array_equal(full, alone)


def test_values_that_overflow_are_told(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = write_srvgg(tmp_path / "x.safetensors")
    weights = load_file(path)
    weights["body.4.bias"] += np.float32(3e38)
    weights["body.4.weight"] *= np.float32(1e38)
    save_file(weights, path)
    (made,) = jaxdiff.load(path).generate([Request(prompt="", image=picture(8, 8))])
    assert not made.finite


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(prompt="a cat"), "this model enlarges images: give it image"),
        (Request(prompt="", image=picture(8, 8), steps=5), "an upscaler takes no steps"),
        (Request(prompt="", image=picture(8, 8), sampler="ddim"), "sampler must be one of none"),
        (
            Request(prompt="", image=picture(8, 8), mask_image=np.ones((8, 8), bool)),
            "this model enlarges whole images; leave mask_image out",
        ),
        (
            Request(prompt="", image=picture(2049, 8)),
            "height must be a whole number from 1 to 8192",
        ),
    ],
)
def test_what_an_upscaler_cannot_use_is_refused(rrdb, request_, reason):
    with pytest.raises(InputError, match=reason):
        rrdb.generate([request_])
