"""A model for workers that is there at once: its images are noise, drawn from their seeds.

Importing this lets workers load it in place of any other, for tests in which no network takes part.
"""

import itertools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from unittest import mock

import numpy as np

import jaxdiff


class NoiseModel:
    """The parts of a `TextToImage` that a worker uses."""

    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="cpu", platform="cpu")]))
    ensemble = SimpleNamespace(fingerprint=mock.ANY)
    checkpoint = SimpleNamespace(defaults=SimpleNamespace(size=(64, 64)))
    prompt_sizes = ()
    enlarges = 1
    encodes_ahead = False

    def slots(self, request, batch_size: int) -> int:
        return batch_size

    def stream_bucket(self, requests: Iterable, batch_size: int) -> Iterator[SimpleNamespace]:
        requests = iter(requests)
        while batch := [*itertools.islice(requests, batch_size)]:
            yield from self.make(batch)

    def make(self, batch: list) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(pixels=_pixels(request), request=request, finite=finite(request))
            for request in batch
        ]


def finite(request) -> bool:
    return True


def _pixels(request) -> np.ndarray:
    shape = (request.height, request.width, 3)
    return np.random.default_rng(request.seed).integers(0, 256, shape, dtype=np.uint8)


jaxdiff.load = lambda *_, **__: NoiseModel()
