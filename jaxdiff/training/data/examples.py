"""Opens captioned images in any storage format, with random access."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.dataset import ledger, run
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.names import PLAN
from jaxdiff.errors import InputError
from jaxdiff.images import decoding
from jaxdiff.training.data import encoded, files
from jaxdiff.training.data.encoded import EncodedExamples
from jaxdiff.training.recipe import Data


@dataclass(frozen=True, eq=False)
class Examples:
    """Captioned images with random access; thread-safe.

    Attributes:
      path: the folder of the images.
      names: one per image, for messages: its file, with the row or the archive member.
      captions: one per image.
      sizes: int32 [n, 2], height and width in pixels, from the headers.
      places: the location of each image file, the argument of `read`.
      read: returns the bytes of an image file at a place.
      control_places: the location of each control image; empty if there are none.
    """

    path: Path
    names: list[str]
    captions: list[str]
    sizes: np.ndarray
    places: list[tuple]
    read: Callable[[Any], bytes]
    control_places: Sequence[tuple] = ()

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, index: int) -> str:
        """Returns the caption of an image."""
        return self.captions[index]

    def pixels(self, index: int) -> np.ndarray:
        """Decodes an image to uint8 [height, width, 3], upright and composited on white.

        Raises:
          InputError: naming the image, if it cannot be decoded or has changed since it was opened.
        """
        name = self.names[index]
        pixels = self._decoded(name, self.places[index])
        if pixels.shape[:2] != tuple(self.sizes[index]):
            raise InputError(
                f"{name} has changed since it was opened; leave images unchanged during a run"
            )
        return pixels

    def control(self, index: int) -> np.ndarray:
        """Decodes the control image of an image, in the same form.

        Raises:
          InputError: naming the image, if it cannot be decoded or has another size than the image.
        """
        name = f"{self.names[index]}: its control image"
        pixels = self._decoded(name, self.control_places[index])
        height, width = self.sizes[index]
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise InputError(
                f"{name} has {found} pixels, the image {width}x{height}; make them the same size"
            )
        return pixels

    def _decoded(self, name: str, place: tuple) -> np.ndarray:
        try:
            content = self.read(place)
        except OSError as problem:
            raise InputError(
                f"{name} can no longer be read: {problem.strerror}; restore it"
            ) from None
        return decoding.decode(content, name)


def open_examples(data: Data, control: str = "") -> Examples | EncodedExamples:
    """Opens the captioned images in a folder and detects their storage format.

    Reads every caption and every image's header, but no pixels.

    Args:
      data: only `path` and `captions` are used; `path` must be a folder, not "shapes".
      control: the column (or the file extension) of control images; "" for none.

    Raises:
      InputError: naming the file, row or key that is invalid.
    """
    folder = Path(data.path)
    if not folder.is_dir():
        raise InputError(f"{data.path}: image folder not found")
    try:
        if encoded.is_encoded(folder):
            return encoded.open_encoded(folder)
        return _open_images(folder, data.captions, control)
    except OSError as problem:
        raise InputError(
            f"{problem.filename or folder} cannot be read: {problem.strerror}"
        ) from None


def _open_images(folder: Path, column: str, control: str) -> Examples:
    paths = _generated(folder) if (folder / PLAN).is_dir() else _found(folder)
    if paths[0].is_dir():
        scan = files.scan_folder
    else:
        scan = {".tar": files.scan_tar, ".parquet": files.scan_parquet}[paths[0].suffix]
    entries = [entry for path in paths for entry in scan(path, column, control)]
    if not entries:
        raise InputError(f"{folder} contains no images; add some or choose another folder")
    names, captions, sizes, places, controls = map(list, zip(*entries, strict=True))
    controls = controls if control else []
    read = files.read_span
    if scan is files.scan_parquet:
        read = files.parquet_reader([*places, *controls])
    return Examples(folder, names, captions, np.array(sizes, np.int32), places, read, controls)


def _generated(folder: Path) -> list[Path]:
    """Returns the shards that a finished dataset from `jaxdiff generate` lists in its markers."""
    dataset = run.find(folder)
    if dataset is None or ledger.finished(dataset) is None:
        raise InputError(
            f"{folder} is not finished or has missing files; run the same generate command again "
            f"to finish it, or `jaxdiff verify {folder}` for details"
        )
    markers = (shards.read_marker(dataset, shard) for shard in dataset.shards)
    return [dataset.store.path(marker.images_name) for marker in markers]


def _found(folder: Path) -> list[Path]:
    """Returns the folder itself if it has a metadata file, or else its shards sorted by name."""
    if any((folder / name).is_file() for name in files.METADATA):
        return [folder]
    for pattern in ("*.tar", "*.parquet"):
        for place in (folder, folder / "data"):
            if paths := sorted(place.glob(pattern)):
                # If a dataset from the Hub has several splits, use only the training split.
                return [path for path in paths if path.name.startswith("train")] or paths
    raise InputError(
        f"{folder} contains no captioned images: no {' or '.join(files.METADATA)}, and no shards "
        "(*.tar, *.parquet) here or in data/; see docs/data.md for the supported formats"
    )
