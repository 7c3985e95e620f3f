"""Draws a dataset's first 64 images with their prompts: python tools/contact_sheet.py DIR."""

import io
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from jaxdiff.dataset import run
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.errors import InputError

COLUMNS, IMAGES = 8, 64
IMAGE_PX, MARGIN_PX = 160, 8
FONT_PX, LINES = 12, 3
LINE_PX, LINE_CHARACTERS = 15, 26
CELL_PX = IMAGE_PX + 2 * MARGIN_PX, IMAGE_PX + 2 * MARGIN_PX + LINES * LINE_PX


def samples(directory: Path) -> Iterator[Sample]:
    """Yields the finished images of a dataset in shard order."""
    found = run.find(directory)
    if found is None:
        raise InputError(f"{directory} is not a jaxdiff dataset; name the --output of a job")
    for shard in found.shards:
        if marker := shards.read_marker(found, shard):
            with found.store.fetched(*marker.files) as local:
                yield from shards.samples(found, marker, local)


def draw(chosen: list[Sample]) -> Image.Image:
    """Draws a grid of images with the prompt under each."""
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(chosen)) * CELL_PX[0], rows * CELL_PX[1]), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for index, sample in enumerate(chosen):
        x = index % COLUMNS * CELL_PX[0] + MARGIN_PX
        y = index // COLUMNS * CELL_PX[1] + MARGIN_PX
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
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


def main() -> int:
    """Writes DIR/contact_sheet.png."""
    if len(sys.argv) != 2:
        print("usage: python tools/contact_sheet.py DIR", file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    try:
        chosen = list(itertools.islice(samples(directory), IMAGES))
    except (InputError, OSError, ValueError) as problem:
        print(f"contact_sheet: {problem}", file=sys.stderr)
        return 2
    if not chosen:
        print(f"contact_sheet: {directory} has no finished images yet", file=sys.stderr)
        return 2
    draw(chosen).save(directory / "contact_sheet.png")
    print(directory / "contact_sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
