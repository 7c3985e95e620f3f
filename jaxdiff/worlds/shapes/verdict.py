"""Judges strictly whether an image shows its benchmark row: nothing missing, nothing extra."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from jaxdiff.worlds.shapes.benchmark import caption_for
from jaxdiff.worlds.shapes.captions import Caption, Group
from jaxdiff.worlds.shapes.perception import read
from jaxdiff.worlds.shapes.scene import MIN_OFFSET, Object, Scene, holds

# px: so that a pair at the world's minimum offset is judged correct despite reading errors.
# Measured: `read` errs by at most 0.3 px between two centers, even in JPEG at quality 90 and after
# a blur of 1 px with noise.
READING_ERROR = 1.0
JUDGED_OFFSET = MIN_OFFSET - READING_ERROR


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct, and if not, the reason in a few words ("" if it is).

    The part of the reason before the colon is one of a few kinds, for counting.
    """

    correct: bool
    reason: str


def judge(row: dict, pixels: np.ndarray) -> Verdict:
    """Judges an image, uint8 [64, 64, 3], by its benchmark row.

    An image is correct if its objects are exactly those of the row, by number, shape and color,
    with no extra and no unrecognized object; the relation holds by `JUDGED_OFFSET` px between the
    centers; and the background is the named one, or any of the world's if none is named.

    Raises:
      InputError: for an invalid row.
      ValueError: for an array of another shape or dtype.
    """
    return compare(caption_for(row), read(pixels))


def compare(caption: Caption, scene: Scene) -> Verdict:
    """Judges a scene by the caption that it should show."""
    wanted = [(g.shape, g.color) for g in caption.groups for _ in range(g.count)]
    found = scene.objects
    if scene.background is None:
        return Verdict(False, "unrecognised background")
    if caption.background not in (None, scene.background):
        return Verdict(False, f"wrong background: {scene.background}, not {caption.background}")
    if len(found) != len(wanted):
        kind = "too many objects" if len(found) > len(wanted) else "too few objects"
        return Verdict(False, f"{kind}: {len(found)}, not {len(wanted)}")
    if any(thing.shape is None or thing.color is None for thing in found):
        return Verdict(False, f"unrecognised object: {_say(scene)}")
    if Counter(thing.shape for thing in found) != Counter(shape for shape, _ in wanted):
        return Verdict(False, f"wrong shape: {_say(scene)}")
    fits = [order for order in itertools.permutations(found) if _fits(order, wanted)]
    if not fits:
        return Verdict(False, f"wrong color: {_say(scene)}")
    relation = caption.relation
    if relation and not any(holds(relation, *pair, JUDGED_OFFSET) for pair in fits):
        return Verdict(False, f"wrong relation: not {relation}")
    return Verdict(True, "")


def _fits(things: tuple[Object, ...], wanted: list[tuple[str, str | None]]) -> bool:
    return all(
        thing.shape == shape and color in (None, thing.color)
        for thing, (shape, color) in zip(things, wanted, strict=True)
    )


def _say(scene: Scene) -> str:
    things = (Group(t.shape or "thing", t.color or "strange") for t in scene.objects)
    return ", ".join(group.text() for group in things)
