"""Pictures side by side with a caption under each, as one image."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN_PX = 8
FONT_PX, LINES, LINE_PX = 12, 3, 15
CHARACTER_PX = 6.15


def draw(
    pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int, px: int
) -> Image.Image:
    """Draws pictures row by row.

    Args:
      pictures: at least one, uint8 [height, width, 3] of any size; each is scaled to fit.
      captions: one for each picture; long ones are cut.
      columns: the most in a row.
      px: the side of the square that each is scaled to, in pixels.
    """
    rows = -(-len(pictures) // columns)
    width, height = px + 2 * MARGIN_PX, px + 2 * MARGIN_PX + LINES * LINE_PX
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for index, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = index % columns * width + MARGIN_PX
        y = index // columns * height + MARGIN_PX
        image = Image.fromarray(pixels)
        scale = px / max(image.size)
        size = [max(1, round(scale * side)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        sheet.paste(image, (x + (px - size[0]) // 2, y + (px - size[1]) // 2))
        lines = textwrap.wrap(caption, int(px // CHARACTER_PX), max_lines=LINES, placeholder=" ...")
        for number, line in enumerate(lines):
            canvas.text((x, y + px + 4 + number * LINE_PX), line, "black", font)
    return sheet
