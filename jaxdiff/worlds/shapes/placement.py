"""Draws random scenes for captions, with all objects inside the canvas and apart."""

import numpy as np

from jaxdiff.worlds.shapes.captions import Caption, draw_caption, pick
from jaxdiff.worlds.shapes.scene import (
    BACKGROUNDS,
    BOUNDS,
    CANVAS,
    COLORS,
    GAP,
    MARGIN,
    MAX_SIZE,
    MIN_OFFSET,
    MIN_SIZE,
    RELATIONS,
    Object,
    Scene,
    gap,
    holds,
)

TRIES = 20  # positions tried for an object before the scene is started again
ANYWHERE = (0.0, 0.0, CANVAS, CANVAS)

# Composed scenes: the centers of objects, in px. Two objects follow their relation, other numbers
# the pips of a die, except that three make a triangle.
PAIRS = {
    "left of": ((17, 32), (47, 32)),
    "right of": ((47, 32), (17, 32)),
    "above": ((32, 17), (32, 47)),
    "below": ((32, 47), (32, 17)),
}
PIPS = {
    1: ((32, 32),),
    3: ((32, 17), (17, 46), (47, 46)),
    4: ((17, 17), (47, 17), (17, 47), (47, 47)),
    5: ((14, 14), (50, 14), (32, 32), (14, 50), (50, 50)),
}
STRAY = {1: 8, 2: 4, 3: 3, 4: 3, 5: 2}  # px, the maximum offset of centers to each side
SIZES = {1: (21, 30), 2: (18, 26), 3: (17, 24), 4: (16, 22), 5: (16, 20)}  # px across


def sample(rng: np.random.Generator) -> tuple[Scene, str]:
    """Draws a random caption of the grammar and a random scene that it describes."""
    caption = draw_caption(rng)
    return scene_for(caption, rng), caption.text()


def scene_for(caption: Caption, rng: np.random.Generator, composed: bool = False) -> Scene:
    """Draws a random scene with exactly the objects of the caption.

    Objects are inside the canvas and at least `GAP` px apart; a relation holds by `MIN_OFFSET` px.
    If the objects do not fit, the scene is drawn again with smaller ones.

    Args:
      composed: draw large objects near the positions of `PAIRS` and `PIPS`, instead of anywhere.
    """
    background = caption.background or pick(rng, BACKGROUNDS)
    kinds = [
        (group.shape, group.color or pick(rng, COLORS))
        for group in caption.groups
        for _ in range(group.count)
    ]
    count = len(kinds)
    (smallest, largest), windows = (MIN_SIZE, MAX_SIZE), [ANYWHERE] * count
    if composed:
        smallest, largest = SIZES[count]
        centres = PIPS[count] if count != 2 else PAIRS[caption.relation or pick(rng, RELATIONS)]
        stray = STRAY[count]
        windows = [(x - stray, y - stray, x + stray, y + stray) for x, y in centres]
    while (objects := _place(kinds, windows, smallest, largest, caption.relation, rng)) is None:
        largest = max(MIN_SIZE, 0.95 * largest)
        smallest = min(smallest, largest)
    return Scene(background, tuple(objects))


def _place(
    kinds: list[tuple[str, str]],
    windows: list[tuple[float, float, float, float]],
    smallest: float,
    largest: float,
    relation: str | None,
    rng: np.random.Generator,
) -> list[Object] | None:
    """Places objects with centers in windows (left, top, right, bottom); None without room."""
    objects: list[Object] = []
    draws = rng.random((len(kinds), 1 + 2 * TRIES)).tolist()
    for (shape, color), window, (size_draw, *places) in zip(kinds, windows, draws, strict=True):
        size = smallest + (largest - smallest) * size_draw
        left, top, right, bottom = (size * bound for bound in BOUNDS[shape])
        x_least, x_most = max(window[0], MARGIN - left), min(window[2], CANVAS - MARGIN - right)
        y_least, y_most = max(window[1], MARGIN - top), min(window[3], CANVAS - MARGIN - bottom)
        for x_draw, y_draw in zip(places[::2], places[1::2], strict=True):
            x, y = x_least + (x_most - x_least) * x_draw, y_least + (y_most - y_least) * y_draw
            thing = Object(shape, color, x, y, size)
            if relation and objects and not holds(relation, objects[0], thing, MIN_OFFSET):
                continue
            if all(gap(thing, other) >= GAP for other in objects):
                objects.append(thing)
                break
        else:
            return None
    return objects
