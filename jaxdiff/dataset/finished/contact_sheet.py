"""A contact sheet: a dataset's first images with their prompts, in one picture."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from jaxdiff.dataset import run
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.errors import InputError
from jaxdiff.images import decoding, sheet

COLUMNS, IMAGES = 8, 64
ENDINGS = (".png", ".jpg", ".webp")
IMAGE_PX = 160


def write(where: str | Path, path: Path) -> Path:
    """Draws the first 64 images of a dataset, finished or not, and writes a file.

    Args:
      where: the dataset's directory or address.
      path: of the image; its ending chooses the format, such as ".png".

    Returns:
      The path.

    Raises:
      InputError: if there is no dataset, none of its images is made yet, one is damaged, or the
        path has another ending or no folder.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"--sheet {path} must end in one of {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} does not exist; make it first")
    chosen = [*itertools.islice(_samples(where), IMAGES)]
    if not chosen:
        raise InputError(f"{where} has no finished images yet")
    pictures = [decoding.decode(one.image, f"image {one.record['key']}") for one in chosen]
    captions = [one.record["prompt"] for one in chosen]
    sheet.draw(pictures, captions, COLUMNS, IMAGE_PX).save(path)
    return path


def _samples(where: str | Path) -> Iterator[Sample]:
    """Yields the finished images of a dataset in shard order."""
    found = run.open_run(where)
    for shard in found.shards:
        if marker := shards.read_marker(found, shard):
            with found.store.fetched(*marker.files) as local:
                yield from shards.samples(found, marker, local)
