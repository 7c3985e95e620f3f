"""The scenes of the shapes world: vocabulary and geometry, independent of pixels."""

import math
from dataclasses import dataclass

CANVAS = 64  # px, width and height
MIN_SIZE, MAX_SIZE = 14.0, 30.0  # px across
GAP = 2.0  # px between any two objects
MARGIN = 1.0  # px between an object and the canvas's edge, so that the border shows the background
MIN_OFFSET = 8.0  # px between the centers of two objects in a relation

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 30),
    "green": (30, 160, 70),
    "cyan": (40, 200, 220),
    "blue": (40, 80, 220),
    "purple": (140, 50, 180),
    "pink": (245, 130, 190),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
HEART = "heart"  # a seventh shape that no caption has, for teaching a model a new concept
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

RING_HOLE = 0.5  # inner over outer diameter
CROSS_ARM = 1 / 3  # thickness of an arm over its length
STAR_WAIST = 0.45  # inner over outer radius; a drawn pentagram has 0.38, too thin at 14 px
HEART_RISE = 0.0253  # of the heart's center of area above its curve's origin, over its width


@dataclass(frozen=True)
class Object:
    """One object.

    `x`, `y` (px, right and down from the canvas's top left corner) are its center of area and
    `size` (px) is the width of its bounding box. A shape or color that `read` did not recognize is
    None.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """A background's name (None if `read` did not recognize it) and the objects on it."""

    background: str | None
    objects: tuple[Object, ...]


def _star() -> tuple[tuple[float, float], ...]:
    outer = 0.5 / math.sin(math.radians(72))  # so that the star is 1 wide, point to point
    radii = (outer, STAR_WAIST * outer)
    return tuple(
        (radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5))
        for i in range(10)
    )


def _cross() -> tuple[tuple[float, float], ...]:
    a = CROSS_ARM / 2
    corner = ((a, -0.5), (a, -a), (0.5, -a))
    turned = [corner]
    for _ in range(3):
        turned.append(tuple((-y, x) for x, y in turned[-1]))
    return tuple(point for quarter in turned for point in quarter)


def _heart() -> tuple[tuple[float, float], ...]:
    """Traces x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled from 32 to 1."""
    turns = [2 * math.pi * i / 64 for i in range(64)]
    return tuple(
        (
            math.sin(t) ** 3 / 2,
            (5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t)) / 32
            + HEART_RISE,
        )
        for t in turns
    )


_HEIGHT = math.sqrt(3) / 2
# Vertices around the center of area at size 1, y down. Circle and ring have none.
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)),
    "triangle": ((0.0, -_HEIGHT * 2 / 3), (0.5, _HEIGHT / 3), (-0.5, _HEIGHT / 3)),
    "star": _star(),
    "cross": _cross(),
    HEART: _heart(),
}


def _bounds(shape: str) -> tuple[float, float, float, float]:
    if shape not in OUTLINES:
        return (-0.5, -0.5, 0.5, 0.5)
    xs, ys = zip(*OUTLINES[shape], strict=True)
    return (min(xs), min(ys), max(xs), max(ys))


def _area(shape: str) -> float:
    if shape not in OUTLINES:
        return math.pi / 4 * (1 - RING_HOLE**2 if shape == "ring" else 1)
    points = OUTLINES[shape]
    turned = points[1:] + points[:1]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, turned, strict=True))) / 2


# At size 1, around the center: area, bounding box (left, top, right, bottom), bounding circle.
_DRAWN = (*SHAPES, HEART)
AREAS = {shape: _area(shape) for shape in _DRAWN}
BOUNDS = {shape: _bounds(shape) for shape in _DRAWN}
RADII = {s: max(math.hypot(*p) for p in OUTLINES[s]) if s in OUTLINES else 0.5 for s in _DRAWN}


def box(thing: Object) -> tuple[float, float, float, float]:
    """Returns the bounding box of an object: left, top, right, bottom in px."""
    left, top, right, bottom = BOUNDS[thing.shape]
    size = thing.size
    return (
        thing.x + left * size,
        thing.y + top * size,
        thing.x + right * size,
        thing.y + bottom * size,
    )


def gap(a: Object, b: Object) -> float:
    """Returns a lower bound (px) of the distance between two outlines.

    It is the larger of the distances between the bounding circles and between the bounding boxes.
    """
    a_left, a_top, a_right, a_bottom = box(a)
    b_left, b_top, b_right, b_bottom = box(b)
    boxes = max(b_left - a_right, a_left - b_right, b_top - a_bottom, a_top - b_bottom)
    circles = math.hypot(a.x - b.x, a.y - b.y) - RADII[a.shape] * a.size - RADII[b.shape] * b.size
    return max(boxes, circles)


def holds(relation: str, a: Object, b: Object, offset: float) -> bool:
    """Returns whether `a` is `relation` ("left of", ...) `b` by `offset` px between centers."""
    distance = {
        "left of": b.x - a.x,
        "right of": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }
    return distance[relation] >= offset
