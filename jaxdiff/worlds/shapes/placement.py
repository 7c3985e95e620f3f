"""Captions to scenes: what the caption leaves open is drawn at random, and everything fits."""

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
    Object,
    Scene,
    gap,
    holds,
)

TRIES = 20  # places tried for an object before the scene is begun again


def sample(rng: np.random.Generator) -> tuple[Scene, str]:
    """A random caption of the grammar and a random scene that it describes."""
    caption = draw_caption(rng)
    return scene_for(caption, rng), caption.text()


def scene_for(caption: Caption, rng: np.random.Generator) -> Scene:
    """A random scene that the caption describes; objects that it does not mention do not appear.

    Objects lie inside the canvas, at least `GAP` px apart; a relation holds by `MIN_OFFSET` px.
    Crowded scenes whose objects do not fit are drawn again with smaller ones.
    """
    background = caption.background or pick(rng, BACKGROUNDS)
    kinds = [
        (group.shape, group.color or pick(rng, COLORS))
        for group in caption.groups
        for _ in range(group.count)
    ]
    largest = MAX_SIZE
    while (objects := _place(kinds, caption.relation, largest, rng)) is None:
        largest = max(MIN_SIZE, 0.95 * largest)
    return Scene(background, tuple(objects))


def _place(
    kinds: list[tuple[str, str]],
    relation: str | None,
    largest: float,
    rng: np.random.Generator,
) -> list[Object] | None:
    objects: list[Object] = []
    draws = rng.random((len(kinds), 1 + 2 * TRIES)).tolist()
    for (shape, color), (size_draw, *places) in zip(kinds, draws, strict=True):
        size = MIN_SIZE + (largest - MIN_SIZE) * size_draw
        left, top, right, bottom = (size * bound for bound in BOUNDS[shape])
        x_room = CANVAS - 2 * MARGIN - (right - left)
        y_room = CANVAS - 2 * MARGIN - (bottom - top)
        for x_draw, y_draw in zip(places[::2], places[1::2], strict=True):
            x, y = MARGIN - left + x_room * x_draw, MARGIN - top + y_room * y_draw
            thing = Object(shape, color, x, y, size)
            if relation and objects and not holds(relation, objects[0], thing, MIN_OFFSET):
                continue
            if all(gap(thing, other) >= GAP for other in objects):
                objects.append(thing)
                break
        else:
            return None
    return objects
