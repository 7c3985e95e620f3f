"""Is an image what its benchmark row asks for? Strictly: nothing missing, nothing besides."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from jaxdiff.worlds.shapes.benchmark import caption_for
from jaxdiff.worlds.shapes.captions import Caption, Group
from jaxdiff.worlds.shapes.perception import read
from jaxdiff.worlds.shapes.scene import MIN_OFFSET, Object, Scene, holds

# px: so that a pair at the world's own limit is right however it is read. Measured: `read` errs by
# at most 0.3 px between two centres, in JPEG at quality 90 and after a blur of 1 px with noise too.
READING_ERROR = 1.0
JUDGED_OFFSET = MIN_OFFSET - READING_ERROR


@dataclass(frozen=True)
class Verdict:
    """Whether an image is right, and in a few words why not ("" if it is).

    What stands before the reason's colon is one of a handful of kinds that can be counted.
    """

    correct: bool
    reason: str


def judge(row: dict, pixels: np.ndarray) -> Verdict:
    """Judge an image, uint8 [64, 64, 3], by its benchmark row.

    Correct means: the objects are exactly those of the row, by number, shape and color, with no
    further one and none that is not recognised; the relation holds by `JUDGED_OFFSET` px between
    the centres; and the background is the one named, or if none is, any of the world's.
    Raises InputError for a row that cannot be read and ValueError for another array.
    """
    return compare(caption_for(row), read(pixels))


def compare(caption: Caption, scene: Scene) -> Verdict:
    """Judge a scene that was read by the caption it should show."""
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
