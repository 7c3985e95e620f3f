"""A contact sheet: a dataset's first images with their prompts, in one picture."""

import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jaxdiff.dataset import run
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.errors import InputError
from jaxdiff.images import decoding

COLUMNS, IMAGES = 8, 64
ENDINGS = (".png", ".jpg", ".webp")
IMAGE_PX, MARGIN_PX = 160, 8
FONT_PX, LINES = 12, 3
LINE_PX, LINE_CHARACTERS = 15, 26
CELL_PX = IMAGE_PX + 2 * MARGIN_PX, IMAGE_PX + 2 * MARGIN_PX + LINES * LINE_PX


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
    _draw(chosen).save(path)
    return path


def _samples(where: str | Path) -> Iterator[Sample]:
    """Yields the finished images of a dataset in shard order."""
    found = run.open_run(where)
    for shard in found.shards:
        if marker := shards.read_marker(found, shard):
            with found.store.fetched(*marker.files) as local:
                yield from shards.samples(found, marker, local)


def _draw(chosen: list[Sample]) -> Image.Image:
    """Draws a grid of images with the prompt under each."""
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(chosen)) * CELL_PX[0], rows * CELL_PX[1]), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for index, sample in enumerate(chosen):
        x = index % COLUMNS * CELL_PX[0] + MARGIN_PX
        y = index // COLUMNS * CELL_PX[1] + MARGIN_PX
        image = Image.fromarray(decoding.decode(sample.image, f"image {sample.record['key']}"))
        scale = IMAGE_PX / max(image.size)
        size = [max(1, round(scale * side)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        sheet.paste(image, (x + (IMAGE_PX - size[0]) // 2, y + (IMAGE_PX - size[1]) // 2))
        lines = textwrap.wrap(
            sample.record["prompt"], LINE_CHARACTERS, max_lines=LINES, placeholder=" ..."
        )
        for number, line in enumerate(lines):
            canvas.text((x, y + IMAGE_PX + 4 + number * LINE_PX), line, "black", font)
    return sheet
