"""A scene is correct by its own row, and wrong after any corruption."""

from dataclasses import replace

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import Caption, Group, Object, Scene
from jaxdiff.worlds.shapes.scene import GAP, gap


def drawn(count: int, seed: int) -> list[tuple[Caption, Scene]]:
    rng = np.random.default_rng(seed)
    captions = [shapes.draw_caption(rng) for _ in range(count)]
    return [(caption, shapes.scene_for(caption, rng)) for caption in captions]


def verdict(caption: Caption, scene: Scene) -> shapes.Verdict:
    return shapes.judge(shapes.row_for(caption), shapes.render(scene))


def kind(caption: Caption, scene: Scene) -> str:
    return verdict(caption, scene).reason.split(":")[0]


def other(rng, options, than: str) -> str:
    return str(rng.choice([option for option in options if option != than]))


def with_objects(scene: Scene, *objects: Object) -> Scene:
    return replace(scene, objects=objects)


def test_every_captions_scene_is_correct_by_its_own_row():
    for caption, scene in drawn(600, seed=30):
        assert verdict(caption, scene) == shapes.Verdict(True, "")


def test_a_recolored_object_is_wrong():
    rng = np.random.default_rng(0)
    for caption, scene in drawn(500, seed=31):
        if caption.groups[0].color:
            first, *rest = scene.objects
            color = other(rng, shapes.COLORS, first.color)
            changed = with_objects(scene, replace(first, color=color), *rest)
            swapped = {(g.shape, g.color) for g in caption.groups} == {
                (thing.shape, thing.color) for thing in changed.objects
            }
            assert swapped or kind(caption, changed) == "wrong color"


def test_colors_on_the_wrong_shapes_are_wrong():
    caption = Caption((Group("star", "red"), Group("ring", "blue")))
    scene = Scene("white", (Object("star", "blue", 16, 16, 20), Object("ring", "red", 44, 44, 20)))
    assert verdict(caption, scene).reason == "wrong color: a blue star, a red ring"


def test_an_object_of_another_shape_is_wrong():
    rng = np.random.default_rng(0)
    for caption, scene in drawn(300, seed=32):
        first, *rest = scene.objects
        shape = other(rng, shapes.SHAPES, first.shape)
        changed = with_objects(scene, replace(first, shape=shape, size=14.0), *rest)
        # The larger corners of another shape may touch a neighbour, which is also wrong.
        assert kind(caption, changed) in ("wrong shape", "unrecognised object", "too few objects")


def test_an_extra_object_is_wrong():
    rng, tried = np.random.default_rng(0), 0
    for caption, scene in drawn(400, seed=33):
        x, y = rng.uniform(10, 54, 2)
        more = replace(scene.objects[-1], x=x, y=y, size=14.0)
        if len(scene.objects) < 5 and all(gap(more, thing) >= GAP for thing in scene.objects):
            tried += 1
            assert kind(caption, with_objects(scene, *scene.objects, more)) == "too many objects"
    assert tried > 100


def test_a_missing_object_is_wrong():
    for caption, scene in drawn(300, seed=34):
        assert kind(caption, with_objects(scene, *scene.objects[1:])) == "too few objects"


def test_a_swapped_relation_is_wrong():
    tried = 0
    for caption, scene in drawn(800, seed=35):
        a, b = caption.groups[0], caption.groups[-1]
        if caption.relation and a != b and (a.color or a.shape != b.shape):
            tried += 1
            backwards = Caption((b, a), caption.relation, caption.background)
            assert kind(backwards, scene) == "wrong relation"
    assert tried > 100


def test_a_level_pair_is_neither_above_nor_below():
    scene = Scene("gray", (Object("star", "red", 16, 30, 20), Object("ring", "red", 48, 33, 20)))
    for relation, right in [("left of", True), ("right of", False), ("above", False)]:
        caption = Caption((Group("star"), Group("ring")), relation)
        assert verdict(caption, scene).correct == right
    assert not verdict(Caption((Group("star"), Group("ring")), "below"), scene).correct


@pytest.mark.parametrize(("offset", "right"), [(8, True), (6, False), (-8, False)])
@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_a_relation_needs_eight_pixels_between_the_centres(relation, offset, right):
    caption = Caption((Group("star"), Group("ring")), relation)
    across = relation in ("left of", "right of")
    near = 32 + (offset if relation in ("right of", "below") else -offset)
    x, y = (near, 12) if across else (12, near)
    a = Object("star", "red", x, y, 16)
    b = Object("ring", "blue", *((32, 44) if across else (44, 32)), 16)
    assert verdict(caption, Scene("white", (a, b))).correct == right


def test_a_relation_between_identical_objects_holds_either_way():
    scene = Scene("gray", (Object("star", "red", 16, 30, 20), Object("star", "red", 48, 33, 20)))
    for relation in ("left of", "right of"):
        assert verdict(Caption((Group("star"), Group("star")), relation), scene).correct


def test_a_background_other_than_the_named_one_is_wrong():
    scene = Scene("gray", (Object("star", "red", 16, 30, 20),))
    assert verdict(Caption((Group("star"),)), scene).correct
    assert verdict(Caption((Group("star"),), None, "gray"), scene).correct
    assert verdict(Caption((Group("star"),), None, "black"), scene).reason == (
        "wrong background: gray, not black"
    )


def test_noise_and_empty_images_are_wrong_for_every_row():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blank = np.full((64, 64, 3), 245, np.uint8)
    for tag in shapes.TAGS:
        (row,) = shapes.benchmark_rows(tag, 1, seed=0)
        assert not shapes.judge(row, noise).correct
        assert not shapes.judge(row, blank).correct


def test_rows_follow_genevals_schema():
    star_above = Caption((Group("star"), Group("circle")), "above")
    assert shapes.row_for(star_above) == {
        "tag": "position",
        "include": [
            {"class": "circle", "count": 1},
            {"class": "star", "count": 1, "position": ["above", 0]},
        ],
        "prompt": "a star above a circle",
    }
    assert shapes.row_for(Caption((Group("ring", "red", 3),), None, "black")) == {
        "tag": "counting",
        "include": [{"class": "ring", "count": 3, "color": "red"}],
        "exclude": [{"class": "ring", "count": 4}],
        "background": "black",
        "prompt": "three red rings on a black background",
    }


def test_rows_convert_back_to_their_captions():
    for caption, _ in drawn(500, seed=36):
        assert shapes.caption_for(shapes.row_for(caption)) == caption


@pytest.mark.parametrize("tag", shapes.TAGS)
def test_a_tags_rows_are_distinct_and_determined_by_the_seed(tag):
    rows = shapes.benchmark_rows(tag, 24, seed=1)
    assert {row["tag"] for row in rows} == {tag}
    assert len({row["prompt"] for row in rows}) == 24
    assert rows == shapes.benchmark_rows(tag, 24, seed=1)
    assert rows != shapes.benchmark_rows(tag, 24, seed=2)
    for row in rows:
        if tag in ("two_object", "position", "color_attr"):
            assert len({entry["class"] for entry in row["include"]}) == 2
        if tag == "color_attr":
            assert len({entry["color"] for entry in row["include"]}) == 2


def test_a_small_tag_repeats_its_prompts_only_after_all_of_them():
    prompts = [row["prompt"] for row in shapes.benchmark_rows("single_object", 48, seed=0)]
    assert len(set(prompts)) == 24
    assert prompts[:24] == prompts[24:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": None}, "include None"),
        ({"include": [{"class": "dog", "count": 1}]}, "class 'dog'"),
        ({"include": [{"class": "star", "count": 10**9}]}, "count 1000000000"),
        ({"include": [{"class": "star", "count": True}]}, "count True"),
        ({"include": [{"class": "star", "count": 1, "color": "mauve"}]}, "color 'mauve'"),
        ({"include": ["star"]}, "include 'star'"),
        ({"include": [{"class": ["star"], "count": 1}]}, "class"),
        (
            {"include": [{"class": "star", "count": 1, "position": ["above", 0]}]},
            r"position \['above', 0\]",
        ),
        ({"background": "green"}, "background 'green'"),
    ],
)
def test_a_row_of_another_world_is_rejected_in_one_line(change, message):
    row = {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a star"}
    with pytest.raises(InputError, match=message) as error:
        shapes.judge(row | change, np.zeros((64, 64, 3), np.uint8))
    assert "a star" in str(error.value)
    assert "\n" not in str(error.value)
