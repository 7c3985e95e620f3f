"""Enlarges images with a GAN upscaler, tile by tile."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.upscaler import NETWORK
from jaxdiff.devices import batching, parallel, running
from jaxdiff.devices.programs import Program, wait
from jaxdiff.engine.image import Image
from jaxdiff.families.model import networks_of
from jaxdiff.images import fitting, tiles
from jaxdiff.images.tiles import Tiling
from jaxdiff.weights.load import open_network

TILES = 4  # computed at once on each accelerator
# Sides are extended to multiples of these, in pixels: those of images of one tile, so that few
# programs are compiled, and all others, because some networks see squares of 4x4 pixels.
SMALL_MULTIPLE, MULTIPLE = 32, tiles.MULTIPLE


class Upscaler:
    """A loaded upscaler. What it makes of an image does not depend on the others.

    Attributes:
      scale: by how much its network multiplies the sides of an image.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        factor: float,
        dtype,
        mesh: jax.sharding.Mesh,
    ):
        """Locates the weights of the network; `load_weights` reads them.

        Args:
          checkpoint: of the family `upscaler`.
          factor: by how much to enlarge images, at most `scale`.
          dtype: of the weights and the arithmetic.
          mesh: the devices.

        Raises:
          InputError: if the weights do not fit the network.
        """
        model = networks_of(checkpoint)
        network = model.networks[NETWORK]
        tensors = checkpoint.weights(NETWORK)
        self._stored = open_network(network.shapes, network.sharding, tensors, dtype, mesh)
        self.scale, self._factor, self._mesh = model.scale, factor, mesh
        self._programs: dict[tuple[int, int], Future[jax.stages.Compiled]] = {}

        def enlarge(params: dict, pixels: Array) -> tuple[Array, Array]:
            images = model.enlarge(params, pixels.astype(dtype) / 255).astype(jnp.float32)
            return jnp.clip(images, 0, 1) * 255, jnp.isfinite(images).all(axis=(1, 2, 3))

        self._enlarge = Program(enlarge, mesh, (None, 0))

    def load_weights(self) -> None:
        """Reads the weights onto the devices; after that, images can be enlarged."""
        self._params = self._stored.load()

    def compile(self, height: int, width: int) -> "Future[jax.stages.Compiled]":
        """Starts compiling the program for images of this size in pixels; returns it at once."""
        return self._programs[self._program(_tiling(height, width))]

    def images_at_once(self, height: int, width: int) -> int:
        """Returns how many images of this size all devices compute at once."""
        tiling = _tiling(height, width)
        return max(1, self._slots(tiling) // tiling.count)

    def stream(self, images: Iterable[Image]) -> Iterator[Image]:
        """Enlarges images of one size, computing one batch of tiles ahead of the caller.

        Args:
          images: consumed as needed. The network sees their colors. A fourth channel, the opacity,
            is enlarged by a Lanczos filter.
        """
        begun: deque[_Canvas] = deque()
        started: deque[tuple[list[_Tile], Array, Array]] = deque()
        ahead = 1 if parallel.may_run_ahead(self._mesh) else 0
        cut = self._cut(images, begun)
        for first in cut:
            slots = self._slots(first.canvas.tiling)
            batch = [first, *itertools.islice(cut, slots - 1)]
            dispatch = partial(self._dispatch, batch, slots)
            started.append((batch, *running.start(self._mesh, dispatch)))
            if len(started) > ahead:
                _join(*started.popleft())
            yield from self._finished(begun)
        while started:
            _join(*started.popleft())
        yield from self._finished(begun)

    def _cut(self, images: Iterable[Image], begun: "deque[_Canvas]") -> "Iterator[_Tile]":
        for image in images:
            canvas = _Canvas(image, self.scale)
            begun.append(canvas)
            yield from (_Tile(canvas, *place) for place in canvas.tiling.places)

    def _dispatch(self, batch: "list[_Tile]", slots: int) -> tuple[Array, Array]:
        pixels = [canvas.cut(row, column) for canvas, row, column in batch]
        pixels += pixels[-1:] * (slots - len(pixels))
        program = self._program(batch[0].canvas.tiling)
        place = parallel.batch_sharding(self._mesh)
        return wait(self._programs, program)(self._params, jax.device_put(np.stack(pixels), place))

    def _finished(self, begun: "deque[_Canvas]") -> Iterator[Image]:
        while begun and not begun[0].missing:
            yield begun.popleft().finished(self._factor)

    def _program(self, tiling: Tiling) -> tuple[int, int]:
        """Returns the key of the program for these tiles; starts compiling it if it is new."""
        key = tiling.height, tiling.width
        if key not in self._programs:
            shape = (self._slots(tiling), *key, 3)
            place = parallel.batch_sharding(self._mesh)
            pixels = jax.ShapeDtypeStruct(shape, np.uint8, sharding=place)
            self._programs[key] = self._enlarge.compile(self._stored.places, pixels)
        return key

    def _slots(self, tiling: Tiling) -> int:
        """Returns how many tiles all devices compute at once."""
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        each = batching.on_cpu(tiling.width, tiling.height) if on_cpu else TILES
        return each * self._mesh.shape["data"]


class _Tile(NamedTuple):
    """A tile of an image that is being enlarged: its row and its column."""

    canvas: "_Canvas"
    row: int
    column: int


class _Canvas:
    """An image that is being enlarged.

    Attributes:
      tiling: of the image, extended to a size that has a program.
      missing: the number of tiles that have not been added yet.
    """

    def __init__(self, image: Image, scale: int):
        height, width = image.pixels.shape[:2]
        self.tiling = _tiling(height, width)
        self.missing = self.tiling.count
        self._image, self._scale, self._finite = image, scale, image.finite
        full = [_extended(side) for side in (height, width)]
        borders = [(0, full[0] - height), (0, full[1] - width), (0, 0)]
        self._extended = np.pad(image.pixels[..., :3], borders, mode="symmetric")
        self._sum = np.zeros((full[0] * scale, full[1] * scale, 3), np.float32)

    def cut(self, row: int, column: int) -> np.ndarray:
        """Returns a tile's pixels, uint8 [height, width, 3]."""
        top, left = self.tiling.tops[row], self.tiling.lefts[column]
        return self._extended[top : top + self.tiling.height, left : left + self.tiling.width]

    def add(self, row: int, column: int, pixels: np.ndarray, finite: bool) -> None:
        """Adds an enlarged tile, float32 [scale height, scale width, 3] in 0..255."""
        tiling, scale = self.tiling, self._scale
        top, left = scale * tiling.tops[row], scale * tiling.lefts[column]
        if tiling.count > 1:
            down, across = _weights(tiling, scale)
            pixels = pixels * down[row][:, None, None] * across[column][:, None]
        height, width = pixels.shape[:2]
        self._sum[top : top + height, left : left + width] += pixels
        self._finite &= finite
        self.missing -= 1

    def finished(self, factor: float) -> Image:
        """Returns the image, enlarged by `factor`."""
        height, width = self._image.pixels.shape[:2]
        whole = self._sum[: self._scale * height, : self._scale * width]
        pixels = np.round(np.nan_to_num(whole)).astype(np.uint8)
        if factor != self._scale:
            size = [fitting.enlarged(side, factor) for side in (height, width)]
            pixels = fitting.fitted(pixels, *size)
        if self._image.pixels.shape[-1] == 4:
            alpha = fitting.fitted(self._image.pixels[..., 3], *pixels.shape[:2])
            if alpha.min() < 255:
                pixels = np.dstack([pixels, alpha])
        return replace(self._image, pixels=pixels, finite=bool(self._finite))


def _join(batch: list[_Tile], pixels: Array, finite: Array) -> None:
    """Waits for a batch, and adds its tiles to their images."""
    every = zip(batch, np.asarray(pixels), np.asarray(finite), strict=False)
    for (canvas, row, column), image, is_finite in every:
        canvas.add(row, column, image, is_finite)


def _extended(side: int) -> int:
    """Returns the side that the network sees in the place of one of `side` pixels."""
    multiple = SMALL_MULTIPLE if side <= tiles.SIDE else MULTIPLE
    return -(-side // multiple) * multiple


def _tiling(height: int, width: int) -> Tiling:
    return tiles.tiling(_extended(height), _extended(width))


@cache
def _weights(tiling: Tiling, scale: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the weights of enlarged tiles, down and across."""
    return (
        tiles.weights(tiling.tops, tiling.height, scale),
        tiles.weights(tiling.lefts, tiling.width, scale),
    )
