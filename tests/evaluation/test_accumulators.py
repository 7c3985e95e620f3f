"""Summaries do not depend on the order of the images or on how they are divided into parts."""

import io
import tracemalloc

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.evaluation.accumulators import Moments, Sample

ROWS, WIDTH = 1000, 12


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Features far from zero, where a naive sum of squares would lose precision."""
    random = np.random.default_rng(0)
    return random.standard_normal((ROWS, WIDTH)) @ random.standard_normal((WIDTH, WIDTH)) + 1e4


@pytest.fixture(scope="module")
def keys() -> list[str]:
    return [f"{number:09d}" for number in range(ROWS)]


def in_parts(random: np.random.Generator) -> list[np.ndarray]:
    """Returns all row numbers in random order, in parts of random sizes, some of them empty."""
    return np.split(random.permutation(ROWS), np.sort(random.integers(0, ROWS + 1, 20)))


@pytest.mark.parametrize("seed", range(3))
def test_moments_match_numpy_for_any_parts(features, seed):
    random = np.random.default_rng(seed)
    parts = [Moments.of(features[part]) for part in in_parts(random)]
    while len(parts) > 1:  # merge a random pair
        one, other = (parts.pop(random.integers(len(parts))) for _ in range(2))
        parts.append(one.merge(other))
    (moments,) = parts
    assert moments.count == ROWS
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-12)
    covariance = np.cov(features, rowvar=False)
    error = np.abs(moments.scatter / (ROWS - 1) - covariance).max()
    assert error <= 1e-12 * np.abs(covariance).max()


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_is_bit_identical_for_any_parts(features, keys, seed):
    sample = Sample.of([], np.zeros((0, 0)), 50)
    for part in in_parts(np.random.default_rng(seed)):
        sample = sample.add([keys[row] for row in part], features[part])
    whole = Sample.of(keys, features, 50)
    assert sample.hashes.tobytes() == whole.hashes.tobytes()
    assert sample.features.tobytes() == whole.features.tobytes()
    assert sample.features.dtype == np.float32
    assert len(sample.features) == 50


def test_a_sample_is_drawn_uniformly(keys):
    numbers = np.arange(ROWS, dtype=np.float64)[:, None]
    drawn = Sample.of(keys, numbers, 400).features
    assert abs(drawn.mean() - numbers.mean()) < 4 * numbers.std() / np.sqrt(400)


def test_an_image_that_is_added_twice_counts_once(features, keys):
    sample = Sample.of(keys, features, 50)
    again = sample.add(keys, features).merge(sample)
    assert again.hashes.tobytes() == sample.hashes.tobytes()
    assert again.features.tobytes() == sample.features.tobytes()


def test_a_sample_of_few_images_contains_them_all(features, keys):
    sample = Sample.of(keys[:5], features[:5], 50)
    assert sorted(sample.features[:, 0]) == sorted(features[:5, 0].astype(np.float32))


def test_merged_samples_have_the_smaller_size(features, keys):
    small = Sample.of(keys[:500], features[:500], 20)
    merged = Sample.of(keys[500:], features[500:], 300).merge(small)
    assert merged.size == 20
    assert merged.features.tobytes() == Sample.of(keys, features, 20).features.tobytes()


def test_both_can_be_saved_to_one_file_without_pickle(features, keys):
    moments, sample = Moments.of(features), Sample.of(keys, features, 50)
    file = io.BytesIO()
    np.savez(file, **moments.arrays(), **sample.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        read = {**Moments.from_arrays(arrays).arrays(), **Sample.from_arrays(arrays).arrays()}
    for name, array in {**moments.arrays(), **sample.arrays()}.items():
        assert read[name].tobytes() == array.tobytes()


def test_memory_does_not_grow_with_the_images():
    random = np.random.default_rng(0)
    batches = [random.standard_normal((1000, 64), np.float32) for _ in range(3)]

    def peak(turns: int) -> int:
        tracemalloc.start()
        moments, sample = Moments.of(np.zeros((0, 64))), Sample.of([], np.zeros((0, 64)), 2000)
        for turn in range(turns):
            batch = batches[turn % 3]
            moments = moments.add(batch)
            sample = sample.add([f"{turn}-{row}" for row in range(len(batch))], batch)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert moments.count == turns * 1000
        assert len(sample.features) == 2000
        return most

    assert peak(40) < 1.05 * peak(8)


def test_other_values_than_a_table_of_numbers_are_rejected():
    with pytest.raises(InputError, match=r"a table of numbers.*\[4\]"):
        Moments.of(np.zeros(4))
    with pytest.raises(InputError, match="9000 features per image are more than 8192"):
        Moments.of(np.zeros((2, 9000)))
    with pytest.raises(InputError, match="row 1 of the features has a number that is not finite"):
        Sample.of(["a", "b"], np.array([[1.0], [np.nan]]), 2)
    with pytest.raises(InputError, match="cannot compare 3 with 4 features per image"):
        Moments.of(np.zeros((2, 3))).add(np.zeros((2, 4)))
    with pytest.raises(InputError, match="cannot compare 1 with 2 features per image"):
        Sample.of("a", np.zeros((1, 1)), 2).add("b", np.zeros((1, 2)))
