"""The batch size follows a device's memory: the compiler estimates it, and a run confirms it."""

import pytest

import jaxdiff
from jaxdiff.devices import batching

GB = 10**9


def linear(fixed, each):
    return lambda size: fixed + size * each


@pytest.mark.parametrize(
    ("limit", "size"),
    [(90 * GB, 64), (80 * GB, 32), (40 * GB, 16), (12 * GB, 8), (5 * GB, 2), (1 * GB, 1)],
)
def test_the_largest_power_of_two_that_fits_is_chosen(limit, size):
    memory = linear(2 * GB, int(1.1 * GB))
    assert batching.largest(memory, limit, lambda _: True) == size
    assert size == 1 or memory(size) <= batching.USED * limit


def test_a_batch_is_not_larger_than_the_number_of_images():
    assert batching.largest(linear(0, 1), 10**6, lambda _: True, most=4) == 4


def test_a_batch_that_does_not_run_is_halved_until_it_does():
    tried = []

    def runs(size):
        tried.append(size)
        return size <= 8

    assert batching.largest(linear(0, GB), 100 * GB, runs) == 8
    assert tried == [64, 32, 16, 8]


def test_sizes_that_need_more_memory_than_estimated_are_not_tried():
    def memory(size):
        return GB * (size if size < 32 else 10 * size)

    assert batching.largest(memory, 100 * GB, lambda size: size < 32) == 16


@pytest.mark.parametrize(
    ("size", "batch_size", "shard"),
    [
        *((1000, "auto", 1000), (100, "auto", 96), (3, "auto", 8)),
        *((1000, 8, 1000), (1000, 3, 999), (2, 3, 3)),
    ],
)
def test_a_shard_has_full_batches(size, batch_size, shard):
    assert batching.full(size, batch_size) == shard


@pytest.mark.parametrize(
    ("images", "parts", "size"), [(1, 4, 1), (8, 4, 2), (9, 4, 4), (9, 1, 16), (10**6, 4, 64)]
)
def test_no_batch_is_larger_than_the_images_need(images, parts, size):
    assert batching.enough(images, parts) == size


@pytest.fixture
def accelerator(tiny_checkpoint, monkeypatch):
    """Returns a function that loads a model, with its CPU treated as an accelerator."""

    def load(limit):
        model = jaxdiff.load(tiny_checkpoint)
        monkeypatch.setattr(type(model._sampler), "_on_cpu", False)
        stats = type("Stats", (), {"memory_stats": lambda _: {"bytes_limit": limit}})
        monkeypatch.setattr(type(model._sampler), "_first_device", stats())
        return model

    return load


def test_a_models_batch_size_follows_its_memory(accelerator):
    request = jaxdiff.Request(prompt="", steps=1)
    model = accelerator(limit=10**12)
    request = model.resolve(request)
    assert model.largest_batch_size(request, most=2) == 2
    assert accelerator(limit=10**6).largest_batch_size(request) == 1
