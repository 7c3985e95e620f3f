"""A batch depends only on the seed and the step, and all images are used equally often."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
import pytest
from captioned import SIZES, encoded

from jaxdiff.errors import InputError
from jaxdiff.training.data import Examples, batches, buckets, open_examples
from jaxdiff.training.recipe import Data

BUCKETS = buckets(16, 2.0, 4)


@pytest.fixture(scope="module")
def examples(stored) -> Examples:
    return open_examples(Data(path=str(stored["webdataset"])))


def numbered(sizes: list[tuple[int, int]]) -> Examples:
    """Makes black images whose captions are their numbers."""
    numbers = range(len(sizes))
    return Examples(
        path=Path("numbered"),
        names=[f"image {number}" for number in numbers],
        captions=[str(number) for number in numbers],
        sizes=np.array(sizes, np.int32),
        places=sizes,
        read=lambda size: encoded(np.zeros((*size, 3), np.uint8)),
    )


def seen(batch, steps: int) -> Counter:
    return Counter(caption for step in range(steps) for caption in batch(step)["captions"])


def test_buckets_have_about_the_requested_area_and_never_more():
    assert buckets(512, 1.0, 64) == [(512, 512)]
    found = buckets(512, 2.0, 64)
    assert found == sorted(
        {(w, h) for h, w in found}, reverse=True
    )  # symmetric in height and width
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.8 * 512**2 <= height * width <= 512**2
        assert max(height / width, width / height) <= 2
    assert {(512, 512), (576, 448), (640, 384), (448, 576)} <= set(found)


@pytest.mark.parametrize(
    "arguments", [(500, 1.0, 64), (0, 1.0, 8), (64, 0.5, 8), (64, float("nan"), 8)]
)
def test_invalid_buckets_are_rejected(arguments):
    with pytest.raises(InputError, match="must be"):
        buckets(*arguments)


def test_a_batch_depends_on_seed_and_step_only(examples):
    def make(seed: int):
        return batches(examples, batch_size=4, seed=seed, sizes=BUCKETS, flip=True)

    batch, steps = make(7), range(20)
    expected = [batch(step) for step in steps]
    with ThreadPoolExecutor(4) as threads:
        shuffled = list(threads.map(make(7), reversed(steps)))
    for one, other in zip(expected, reversed(shuffled), strict=True):
        assert one["captions"] == other["captions"]
        np.testing.assert_array_equal(one["pixels"], other["pixels"])
    assert expected[0]["pixels"].dtype == np.uint8
    assert {one["pixels"].shape[1:3] for one in expected} == set(BUCKETS)
    assert [one["captions"] for one in expected] != [make(8)(step)["captions"] for step in steps]


def test_loading_on_threads_can_start_in_the_middle_of_an_epoch(examples):
    batch = batches(examples, batch_size=5, seed=2, sizes=BUCKETS)

    def loaded(start: int) -> list[dict]:
        steps = grain.MapDataset.range(start, 12).map(batch)
        return list(steps.to_iter_dataset(grain.ReadOptions(num_threads=4)))

    whole, resumed = loaded(0), loaded(7)
    for step, one in enumerate(whole):
        assert one["captions"] == batch(step)["captions"]
    for one, other in zip(whole[7:], resumed, strict=True):
        np.testing.assert_array_equal(one["pixels"], other["pixels"])


def test_every_image_is_used_equally_often_and_each_batch_has_one_size():
    sizes = [(8, 8)] * 5 + [(8, 4)] * 3 + [(4, 8)] * 13
    batch = batches(numbered(sizes), batch_size=4, seed=3, sizes=[(8, 8), (8, 4), (4, 8)])
    epochs = 12
    steps = epochs * len(sizes) // 4
    for step in range(steps):
        one = batch(step)
        assert {sizes[int(caption)] for caption in one["captions"]} == {one["pixels"].shape[1:3]}
    counts = seen(batch, steps)
    assert counts.keys() == {str(number) for number in range(len(sizes))}
    assert max(counts.values()) - min(counts.values()) <= 2
    assert sum(counts.values()) == epochs * len(sizes)


def test_an_epoch_of_one_size_is_a_permutation():
    batch = batches(numbered([(8, 8)] * 12), batch_size=4, seed=0, sizes=[(8, 8)])
    epochs = [seen(lambda step, e=e: batch(3 * e + step), 3) for e in range(4)]
    assert all(set(epoch.values()) == {1} and len(epoch) == 12 for epoch in epochs)
    orders = {tuple(batch(3 * e)["captions"]) for e in range(4)}
    assert len(orders) == 4


def test_a_batch_may_be_larger_than_the_data():
    batch = batches(numbered([(8, 8)] * 3), batch_size=8, seed=0, sizes=[(8, 8)])
    assert set(seen(batch, 3).values()) == {8}


def test_only_the_requested_images_are_used():
    batch = batches(numbered([(8, 8)] * 9), batch_size=2, seed=0, sizes=[(8, 8)], among=[2, 5])
    assert seen(batch, 6) == {"2": 6, "5": 6}


def test_images_of_the_right_size_are_unchanged(examples):
    squares = [number for number, size in enumerate(SIZES) if size == (16, 16)]
    batch = batches(examples, batch_size=4, seed=0, sizes=[(16, 16)], among=squares)(0)
    for pixels, caption in zip(batch["pixels"], batch["captions"], strict=True):
        number = int(caption.split()[1])
        np.testing.assert_array_equal(pixels, examples.pixels(number))


def test_half_of_the_images_are_mirrored_on_request(examples):
    squares = [number for number, size in enumerate(SIZES) if size == (16, 16)]
    batch = batches(examples, batch_size=4, seed=1, sizes=[(16, 16)], among=squares, flip=True)
    mirrored = 0
    for step in range(16):
        one = batch(step)
        for pixels, caption in zip(one["pixels"], one["captions"], strict=True):
            stored = examples.pixels(int(caption.split()[1]))
            mirrored += np.array_equal(pixels, stored[:, ::-1])
            assert np.array_equal(pixels, stored) or np.array_equal(pixels, stored[:, ::-1])
    assert 16 < mirrored < 48


def test_images_that_are_too_small_are_counted_and_the_first_is_named(examples):
    with pytest.raises(InputError, match=r"b/0000' has 16x16 pixels but needs 32x32; 12 of 12"):
        batches(examples, batch_size=4, seed=0, sizes=[(32, 32)])
