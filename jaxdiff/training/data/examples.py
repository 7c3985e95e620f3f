"""Captioned images in any of their forms, with random access."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.dataset import ledger
from jaxdiff.dataset import local as layout
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.errors import InputError
from jaxdiff.training.data import decoding, encoded, files
from jaxdiff.training.data.encoded import EncodedExamples
from jaxdiff.training.recipe import Data


@dataclass(frozen=True, eq=False)
class Examples:
    """Captioned images; any of them may be read at any time, on any thread.

    Attributes:
      path: the folder that they come from.
      names: of each image, for people: its file, with the row or the member.
      captions: what is said of each.
      sizes: int32 [n, 2], height and width in pixels, as the headers tell.
      places: where each image file lies.
      read: the bytes of an image file, by its place.
    """

    path: Path
    names: list[str]
    captions: list[str]
    sizes: np.ndarray
    places: list[tuple]
    read: Callable[[Any], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, index: int) -> str:
        """What is said of an image."""
        return self.captions[index]

    def pixels(self, index: int) -> np.ndarray:
        """An image, uint8 [height, width, 3]: upright, on white if it is transparent.

        Raises:
          InputError: naming the image, if it cannot be decoded or is not as it was when opened.
        """
        name = self.names[index]
        try:
            content = self.read(self.places[index])
        except OSError as problem:
            raise InputError(f"{name} cannot be read any more ({problem.strerror})") from None
        pixels = decoding.decode(content, name)
        if pixels.shape[:2] != tuple(self.sizes[index]):
            raise InputError(f"{name} has changed since the training began; start it again")
        return pixels


def open_examples(data: Data) -> Examples | EncodedExamples:
    """Finds the captioned images of a folder; what lies in it tells their form.

    Every caption and every image's header is read, no pixel.

    Args:
      data: its `path` and `captions` count; the shapes world is no folder.

    Raises:
      InputError: naming the file, the row or the key, if it cannot be used.
    """
    folder = Path(data.path)
    if not folder.is_dir():
        raise InputError(f"{data.path}: there is no such folder of images")
    try:
        if encoded.is_encoded(folder):
            return encoded.open_encoded(folder)
        return _open_images(folder, data.captions)
    except OSError as problem:
        raise InputError(
            f"{problem.filename or folder} cannot be read: {problem.strerror}"
        ) from None


def _open_images(folder: Path, column: str) -> Examples:
    paths = _generated(folder) if (folder / layout.PLAN).is_dir() else _found(folder)
    if paths[0].is_dir():
        scan = files.scan_folder
    else:
        scan = {".tar": files.scan_tar, ".parquet": files.scan_parquet}[paths[0].suffix]
    entries = [entry for path in paths for entry in scan(path, column)]
    if not entries:
        raise InputError(f"{folder} holds no image; there is nothing to train on")
    names, captions, sizes, places = (list(column) for column in zip(*entries, strict=True))
    read = files.parquet_reader(places) if scan is files.scan_parquet else files.read_span
    return Examples(folder, names, captions, np.array(sizes, np.int32), places, read)


def _generated(folder: Path) -> list[Path]:
    """The shards of a dataset that `jaxdiff generate` has finished, as their markers name them."""
    plan = plans.load(folder)
    if plan is None or ledger.finished(folder, plan) is None:
        raise InputError(
            f"{folder} is not finished, or has lost files: the same generate command finishes it, "
            f"`jaxdiff verify {folder}` tells more"
        )
    return [folder / shards.file_names(plan, shard)[0] for shard in range(len(plan.shard_sizes))]


def _found(folder: Path) -> list[Path]:
    """The folder itself, if it tells of images one by one, or its shards in the order of names."""
    if any((folder / name).is_file() for name in files.METADATA):
        return [folder]
    for pattern in ("*.tar", "*.parquet"):
        for place in (folder, folder / "data"):
            if paths := sorted(place.glob(pattern)):
                # Of a dataset of the Hub with several splits, the one that is for training.
                return [path for path in paths if path.name.startswith("train")] or paths
    raise InputError(
        f"{folder} holds no captioned images: neither {' nor '.join(files.METADATA)} nor shards "
        "(*.tar, *.parquet), here or in data/; docs/data.md tells of the forms"
    )
