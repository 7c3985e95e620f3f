"""Copies are found even if their files were altered, and different images are not copies."""

import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.evaluation.duplicates import (
    HashIndex,
    perceptual_hash,
    pixel_hashes,
    read_training_set,
)
from jaxdiff.images import image_files
from jaxdiff.training.data import encoded
from jaxdiff.worlds import shapes

SCENES, PHOTOGRAPHS = 500, 60


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    """Scenes of the shapes world, which are as flat as images can be."""
    random = np.random.default_rng(0)
    return [shapes.render(shapes.sample(random)[0]) for _ in range(SCENES)]


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Noise with a spectrum like a photograph's, which falls with the frequency."""
    random = np.random.default_rng(1)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(64)))
    frequency[0, 0] = 1
    noise = np.fft.fft2(random.standard_normal((PHOTOGRAPHS, 3, 64, 96))) / frequency
    waves = np.fft.ifft2(noise).real
    waves = 128 + 45 * (waves + waves[:, :1]) / waves.std()
    return list(np.clip(waves, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def as_jpeg(pixels: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def brighter(pixels: np.ndarray, levels: int) -> np.ndarray:
    return np.clip(pixels.astype(int) + levels, 0, 255).astype(np.uint8)


def hashed(pictures: list[np.ndarray]) -> np.ndarray:
    return np.array([perceptual_hash(pixels) for pixels in pictures])


@pytest.mark.parametrize(
    "change",
    [
        as_jpeg,
        lambda pixels: resized(pixels, 0.75),
        lambda pixels: resized(pixels, 2),
        lambda pixels: brighter(pixels, 2),
        lambda pixels: brighter(pixels, -2),
    ],
    ids=["jpeg", "smaller", "larger", "brighter", "darker"],
)
def test_an_altered_copy_is_found_in_an_index(change, scenes, photographs):
    originals = scenes[:200] + photographs
    index = HashIndex.build(hashed(originals))
    assert index.within(hashed([change(pixels) for pixels in originals])).all()


def test_few_flat_scenes_and_no_photographs_are_mistaken_for_others(scenes, photographs):
    def share(pictures: list[np.ndarray], distance: int) -> float:
        hashes = hashed(pictures)
        apart = np.bitwise_count(hashes[:, None] ^ hashes)
        return (apart[np.triu_indices(len(hashes), 1)] <= distance).mean()

    assert share(scenes, 3) < 1e-4
    assert share(scenes, 0) < 2e-5
    assert share(photographs, 3) == 0


def test_a_hash_has_its_first_bits_from_the_lowest_frequencies():
    columns = np.cos(np.pi * (np.arange(32) + 0.5) / 32)  # the lowest frequency after the mean
    bright_left = np.clip(128 + 60 * np.tile(columns, (32, 1)), 0, 255)
    pixels = np.repeat(bright_left[..., None], 3, axis=2).round().astype(np.uint8)
    assert perceptual_hash(pixels) == 1 << 63
    assert perceptual_hash(pixels.transpose(1, 0, 2)) == 1 << 62
    assert perceptual_hash(255 - pixels) == 0
    assert perceptual_hash(np.zeros((5, 9, 3), np.uint8)) == 0
    assert perceptual_hash(pixels).dtype == np.uint64


@pytest.fixture(scope="module")
def crowd() -> np.ndarray:
    """Hashes of which many share a band and some are close to others."""
    random = np.random.default_rng(2)
    hashes = random.integers(0, 2**63, 3000, np.uint64)
    hashes[:1500] &= ~np.uint64(0xFFFF)
    return np.concatenate([hashes, hashes[:300] ^ np.uint64(0b101)])


@pytest.mark.parametrize("distance", range(4))
def test_an_index_finds_the_same_copies_as_comparing_all_pairs(crowd, distance, monkeypatch):
    monkeypatch.setattr("jaxdiff.evaluation.duplicates.CANDIDATES", 1000)  # many rounds
    random = np.random.default_rng(3)
    asked = crowd[random.integers(0, len(crowd), 1000)]
    for _ in range(4):  # flip up to four bits of each
        flip = random.random(len(asked)) < 0.7
        asked[flip] ^= np.uint64(1) << random.integers(0, 64, flip.sum(), np.uint64)
    apart = np.bitwise_count(asked[:, None] ^ crowd).min(axis=1)
    assert 0 < (apart <= distance).sum() < len(asked)
    expected = (apart <= distance).tolist()
    assert HashIndex.build(crowd).within(asked, distance).tolist() == expected


def test_an_empty_index_finds_nothing(crowd):
    assert not HashIndex.build(crowd[:0]).within(crowd).any()
    assert HashIndex.build(crowd).within(crowd[:0]).shape == (0,)
    with pytest.raises(ValueError, match="from 0 to 3, not 4"):
        HashIndex.build(crowd).within(crowd, 4)


def test_an_index_is_small_and_so_is_a_search():
    random = np.random.default_rng(4)
    hashes = random.integers(0, 2**63, 200_000, np.uint64)
    tracemalloc.start()
    index = HashIndex.build(hashes)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    assert index.within(hashes ^ np.uint64(1 << 40)).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 40 * len(hashes) + 2**22
    assert peak - kept < 2**27


def write_images(folder, pictures: list[np.ndarray]) -> str:
    folder.mkdir()
    lines = []
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "a scene"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_copies_of_a_training_set_are_distinguished_from_other_images(tmp_path, scenes):
    training = read_training_set(write_images(tmp_path / "images", scenes[:20]), 64, 64)
    shown = [scenes[3], as_jpeg(scenes[5]), scenes[40]]
    digests = pixel_hashes(image_files.pixel_sha256(pixels) for pixels in shown)
    assert training.copied(digests).tolist() == [True, False, False]
    assert training.near.within(hashed(shown)).tolist() == [True, True, False]


def test_training_images_are_cropped_as_in_training(tmp_path, scenes):
    wide = np.pad(scenes[0], ((0, 0), (20, 20), (0, 0)), "edge")
    training = read_training_set(write_images(tmp_path / "images", [wide]), 64, 64)
    assert training.copied(pixel_hashes([image_files.pixel_sha256(scenes[0])])).all()


def test_an_unreadable_training_image_is_named(tmp_path, scenes):
    path = write_images(tmp_path / "images", scenes[:2])
    whole = (tmp_path / "images/1.png").read_bytes()
    (tmp_path / "images/1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"1\.png is not a readable image"):
        read_training_set(path, 64, 64)
    with pytest.raises(InputError, match="image folder not found"):
        read_training_set(str(tmp_path / "none"), 64, 64)


def test_a_training_set_of_latents_has_no_pixels_to_compare(tmp_path):
    (tmp_path / "data").mkdir()
    latents, shard = np.zeros((1, 4, 2, 2)), encoded.Shard("data/0.safetensors", 16, 16, 1)
    (tmp_path / shard.file).write_bytes(encoded.shard_bytes(latents, latents, ["a scene"], {}))
    (tmp_path / encoded.INDEX).write_text(encoded.index_text([shard], {"autoencoder": "a"}))
    with pytest.raises(InputError, match="holds latents, not pixels; name the folder of images"):
        read_training_set(str(tmp_path), 16, 16)
