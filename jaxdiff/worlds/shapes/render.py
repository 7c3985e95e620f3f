"""Renders scenes to pixels: draws with Pillow at four times the size, then averages."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from jaxdiff.worlds.shapes.scene import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    OUTLINES,
    RING_HOLE,
    Object,
    Scene,
)

SUPERSAMPLING = 4
LINE = 1.25  # px, the width of outlines


def render(scene: Scene, scale: int = 1) -> np.ndarray:
    """Draws a scene with antialiased edges: uint8 [64 scale, 64 scale, 3], sRGB.

    The same scene gives the same pixels. Colors are averaged as stored, without gamma, so an edge
    pixel is background + coverage * (color - background), which `read` unmixes.
    """
    drawn = SUPERSAMPLING * scale
    side = CANVAS * drawn
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.objects:
        draw(canvas, thing, COLORS[thing.color], drawn)
    return np.array(image.reduce(SUPERSAMPLING))


def outlines(scene: Scene) -> np.ndarray:
    """Draws the objects' edges, white on black and inside the objects: uint8 [64, 64, 3].

    They show shapes, places and sizes, but no colors. The ring has two edges.
    """
    side = CANVAS * SUPERSAMPLING
    image = Image.new("L", (side, side))
    canvas = ImageDraw.Draw(image)
    for thing in scene.objects:
        draw(canvas, thing, 255)
    filled = np.array(image) > 0
    inner = ndimage.binary_erosion(filled, iterations=round(LINE * SUPERSAMPLING))
    lines = Image.fromarray(np.uint8(255) * (filled & ~inner)).reduce(SUPERSAMPLING)
    return np.repeat(np.array(lines)[..., None], 3, axis=-1)


def draw(
    canvas: ImageDraw.ImageDraw,
    thing: Object,
    fill: int | tuple[int, int, int],
    scale: int = SUPERSAMPLING,
) -> None:
    """Draws one object on a canvas that is `scale` times as large as the scene."""
    # Pillow truncates coordinates to whole pixels, by half a pixel on average, and fills the pixels
    # under both edges. So the center needs no half-pixel correction, but the size loses one pixel.
    x, y = thing.x * scale, thing.y * scale
    size = thing.size * scale - 1.0
    if thing.shape in OUTLINES:
        canvas.polygon([(x + px * size, y + py * size) for px, py in OUTLINES[thing.shape]], fill)
        return
    bounds = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    if thing.shape == "circle":
        canvas.ellipse(bounds, fill)
    else:
        width = round(thing.size * scale * (1 - RING_HOLE) / 2)
        canvas.ellipse(bounds, outline=fill, width=width)
