"""Drawing in the shapes world: scenes, captions and pixels."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy.spatial import KDTree

from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import RELATIONS, Caption, Group, Object, Scene
from jaxdiff.worlds.shapes.captions import NUMBERS, PLURALS, TEMPLATES, draw_caption, fill
from jaxdiff.worlds.shapes.placement import SIZES
from jaxdiff.worlds.shapes.scene import AREAS, CANVAS, GAP, MIN_OFFSET, OUTLINES, box, gap, holds

SENTENCE = re.compile(
    r"(?P<first>.+?)(?: (?P<joint>and|left of|right of|above|below) (?P<second>.+?))?"
    r"(?: on a (?P<background>\w+) background)?"
)


def parse(text: str) -> Caption:
    """Parses the grammar in the design, independently of the package."""
    said = SENTENCE.fullmatch(text).groupdict()
    groups = tuple(parse_group(said[part]) for part in ("first", "second") if said[part])
    relation = None if said["joint"] == "and" else said["joint"]
    return Caption(groups, relation, said["background"])


def parse_group(text: str) -> Group:
    number, *color, noun = text.split()
    count = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}[number]
    singular = {plural: shape for shape, plural in PLURALS.items()}
    return Group(noun if count == 1 else singular[noun], color[0] if color else None, count)


def scenes(count: int, seed: int) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(seed)
    return [shapes.sample(rng) for _ in range(count)]


def test_captions_follow_the_design():
    assert PLURALS == {
        "circle": "circles",
        "square": "squares",
        "triangle": "triangles",
        "star": "stars",
        "cross": "crosses",
        "ring": "rings",
    }
    examples = {
        "a ring": Caption((Group("ring"),)),
        "an orange star": Caption((Group("star", "orange"),)),
        "a star and a star": Caption((Group("star"), Group("star"))),
        "five crosses on a gray background": Caption((Group("cross", count=5),), None, "gray"),
        "two orange squares": Caption((Group("square", "orange", 2),)),
        "an orange ring left of a red ring on a white background": Caption(
            (Group("ring", "orange"), Group("ring", "red")), "left of", "white"
        ),
    }
    for text, caption in examples.items():
        assert caption.text() == text


@pytest.mark.parametrize("template", TEMPLATES)
def test_captions_round_trip_through_their_text(template):
    rng = np.random.default_rng(0)
    for background in (None, *shapes.BACKGROUNDS):
        for _ in range(30):
            caption = fill(template, rng, background)
            assert parse(caption.text()) == caption


def test_templates_are_drawn_by_their_weights():
    rng = np.random.default_rng(0)
    captions = [shapes.draw_caption(rng) for _ in range(8000)]

    def template(caption: Caption) -> str:
        color = "{color} " if caption.groups[0].color else ""
        if caption.groups[0].count > 1:
            return f"{{number}} {color}{{shapes}}"
        joint = " {relation} " if caption.relation else " and "
        return joint.join(f"a {color}{{shape}}" for _ in caption.groups)

    names = [template(caption) for caption in captions]
    for name, weight in TEMPLATES.items():
        assert names.count(name) / 8000 == pytest.approx(weight, abs=0.02)
    assert sum(TEMPLATES.values()) == pytest.approx(1.0)
    assert sum(c.background is None for c in captions) / 8000 == pytest.approx(0.5, abs=0.02)


def test_a_scene_has_exactly_what_its_caption_describes():
    for scene, text in scenes(2000, seed=1):
        caption = parse(text)
        wanted = [(g.shape, g.color) for g in caption.groups for _ in range(g.count)]
        assert len(scene.objects) == len(wanted)
        for thing, (shape, color) in zip(scene.objects, wanted, strict=True):
            assert thing.shape == shape
            assert color in (None, thing.color)
        assert caption.background in (None, scene.background)
        if caption.relation:
            assert holds(caption.relation, *scene.objects, MIN_OFFSET)


def test_unspecified_attributes_take_every_value():
    rng = np.random.default_rng(0)
    drawn = [shapes.scene_for(Caption((Group("star", count=3),)), rng) for _ in range(200)]
    assert {scene.background for scene in drawn} == set(shapes.BACKGROUNDS)
    assert {thing.color for scene in drawn for thing in scene.objects} == set(shapes.COLORS)
    assert any(len({thing.color for thing in scene.objects}) == 3 for scene in drawn)


def test_objects_are_inside_the_canvas_and_of_allowed_sizes():
    for scene, _ in scenes(2000, seed=2):
        for thing in scene.objects:
            left, top, right, bottom = box(thing)
            assert min(left, top) >= 0
            assert max(right, bottom) <= CANVAS
            assert 14 <= thing.size <= 30


def outline(thing: Object) -> np.ndarray:
    """Returns points along an object's edge, at most a tenth of a pixel apart: [n, 2]."""
    along = np.linspace(0, 1, 320)[:, None]
    if thing.shape in OUTLINES:
        corners = np.array(OUTLINES[thing.shape])
        edges = zip(corners, np.roll(corners, -1, axis=0), strict=True)
        points = np.concatenate([a + along * (b - a) for a, b in edges])
    else:
        angle = 2 * np.pi * along
        points = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) / 2
    return np.array([thing.x, thing.y]) + thing.size * points


def test_no_two_outlines_are_closer_than_the_gap():
    for scene, _ in scenes(300, seed=3):
        trees = [KDTree(outline(thing)) for thing in scene.objects]
        for a, b in itertools.combinations(trees, 2):
            assert a.query(b.data)[0].min() >= GAP


def test_five_squares_always_find_room():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert len(shapes.scene_for(Caption((Group("square", count=5),)), rng).objects) == 5


def test_composed_scenes_have_large_objects_spread_evenly():
    rng = np.random.default_rng(4)
    for caption in [draw_caption(rng) for _ in range(1000)]:
        things = shapes.scene_for(caption, rng, composed=True).objects
        count = len(things)
        assert count == sum(group.count for group in caption.groups)
        for a, b in itertools.combinations(things, 2):
            assert gap(a, b) >= GAP
            assert math.hypot(a.x - b.x, a.y - b.y) >= CANVAS / 4
        for thing in things:
            left, top, right, bottom = box(thing)
            assert min(left, top) >= 0
            assert max(right, bottom) <= CANVAS
            assert 14 <= SIZES[count][0] <= thing.size <= SIZES[count][1] <= 30
        if caption.relation:
            assert holds(caption.relation, *things, 2 * MIN_OFFSET)


def test_a_composed_pair_without_a_relation_takes_every_relation():
    rng = np.random.default_rng(5)
    pair = Caption((Group("star"), Group("ring")))
    drawn = [shapes.scene_for(pair, rng, composed=True).objects for _ in range(100)]
    for relation in RELATIONS:
        assert any(holds(relation, *things, 2 * MIN_OFFSET) for things in drawn)


def test_the_same_seed_gives_the_same_scenes_and_pixels():
    once, again = scenes(20, seed=7), scenes(20, seed=7)
    assert once == again
    assert scenes(20, seed=8) != once
    for (a, _), (b, _) in zip(once, again, strict=True):
        assert np.array_equal(shapes.render(a), shapes.render(b))


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_an_image_has_the_palettes_colors(background):
    thing = Object("square", "blue", 32, 32, 20)
    image = shapes.render(Scene(background, (thing,)))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert tuple(image[0, 0]) == shapes.BACKGROUNDS[background]
    assert tuple(image[32, 32]) == shapes.COLORS["blue"]


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_shape_has_the_scenes_position_and_size(shape):
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64] + 0.5
    for _ in range(50):
        x, y, size = rng.uniform(22, 42), rng.uniform(22, 42), rng.uniform(14, 30)
        image = shapes.render(Scene("black", (Object(shape, "cyan", x, y, size),)))
        alpha = (image[..., 1] - 16.0) / (200 - 16)
        area = alpha.sum()
        assert (alpha * columns).sum() / area == pytest.approx(x, abs=0.2)
        assert (alpha * rows).sum() / area == pytest.approx(y, abs=0.2)
        assert area == pytest.approx(AREAS[shape] * size**2, rel=0.07)
        width = (alpha.max(axis=0) > 0).sum()
        assert size - 1 <= width <= size + 2  # with an antialiased column on each side


def test_shapes_are_oriented_as_in_the_design():
    def alpha(shape):
        return shapes.render(Scene("black", (Object(shape, "cyan", 32, 32, 28),)))[..., 1] > 100

    for shape in ("triangle", "star"):  # narrow at the top
        rows = np.flatnonzero(alpha(shape).any(axis=1))
        widths = alpha(shape).sum(axis=1)
        assert widths[rows[1]] < 6 < widths[rows[-4]]
    assert not alpha("ring")[32, 32]
    assert alpha("cross")[32].sum() == alpha("cross")[:, 32].sum() == 28
    assert not alpha("cross")[22, 22]
    assert set(NUMBERS) == {2, 3, 4, 5}
