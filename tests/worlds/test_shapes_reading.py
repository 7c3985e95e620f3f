"""The exact scorer reads rendered scenes back, and does not guess at unknown shapes."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import Object, Scene

COUNT = 1000


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(20)
    scenes = [shapes.sample(rng)[0] for _ in range(COUNT)]
    return [(scene, shapes.render(scene)) for scene in scenes]


def content(scene: Scene):
    return scene.background, Counter((thing.shape, thing.color) for thing in scene.objects)


def read_back(drawn, change) -> float:
    """Returns the share of scenes whose background and (shape, color) counts are read exactly."""
    rng = np.random.default_rng(21)
    right = [content(shapes.read(change(image, rng))) == content(scene) for scene, image in drawn]
    return sum(right) / len(right)


def noisy(image, rng):
    return np.clip(np.round(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def encoded(image, **settings):
    file = io.BytesIO()
    Image.fromarray(image).save(file, **settings)
    return np.array(Image.open(file).convert("RGB"))


def test_clean_scenes_are_read_back_exactly_with_centres_and_sizes(drawn):
    right = 0
    for scene, image in drawn:
        seen = shapes.read(image)
        right += content(seen) == content(scene)
        for thing in scene.objects:
            nearest = min(seen.objects, key=lambda o, t=thing: np.hypot(o.x - t.x, o.y - t.y))
            assert np.hypot(nearest.x - thing.x, nearest.y - thing.y) < 1
            assert abs(nearest.size - thing.size) < 1
    assert right / COUNT >= 0.995


def test_scenes_are_read_back_through_noise(drawn):
    assert read_back(drawn[:500], noisy) >= 0.995


@pytest.mark.slow
def test_scenes_are_read_back_from_jpeg(drawn):
    change = lambda image, _: encoded(image, format="JPEG", quality=90)  # noqa: E731
    assert read_back(drawn, change) >= 0.98


def test_scenes_are_read_back_from_lossy_webp(drawn):
    change = lambda image, _: encoded(image, format="WEBP", quality=90)  # noqa: E731
    assert read_back(drawn[:500], change) >= 0.98


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_shape_in_every_color_is_read_at_the_smallest_and_largest_size(shape, background):
    for color in shapes.COLORS:
        for size in (14.0, 30.0):
            scene = Scene(background, (Object(shape, color, 31.3, 32.6, size),))
            assert content(shapes.read(shapes.render(scene))) == content(scene)


def test_an_empty_canvas_has_no_objects():
    for background in shapes.BACKGROUNDS:
        assert shapes.read(shapes.render(Scene(background, ()))) == Scene(background, ())


def painted(draw_on, background=(245, 245, 245)) -> Scene:
    image = Image.new("RGB", (256, 256), background)
    draw_on(ImageDraw.Draw(image))
    return shapes.read(np.array(image.reduce(4)))


BLUE = shapes.COLORS["blue"]
FOREIGN = {
    "diamond": lambda d: d.polygon([(128, 80), (176, 128), (128, 176), (80, 128)], BLUE),
    "bar": lambda d: d.rectangle((78, 108, 178, 148), BLUE),
    "triangle pointing down": lambda d: d.polygon([(80, 90), (176, 90), (128, 173)], BLUE),
    "half disc": lambda d: d.pieslice((80, 80, 176, 176), 180, 360, BLUE),
    "ellipse": lambda d: d.ellipse((68, 98, 188, 158), BLUE),
    "overlapping discs": lambda d: [d.ellipse((x, 90, x + 72, 162), BLUE) for x in (72, 116)],
    "open ring": lambda d: d.arc((80, 80, 176, 176), 30, 330, BLUE, 24),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_shape_is_not_recognised(name):
    seen = painted(FOREIGN[name])
    assert [(thing.shape, thing.color) for thing in seen.objects] == [(None, "blue")]


def test_a_foreign_color_and_a_foreign_background_are_not_recognised():
    brown = painted(lambda d: d.ellipse((80, 80, 176, 176), (110, 70, 40)))
    assert [(thing.shape, thing.color) for thing in brown.objects] == [("circle", None)]
    olive = painted(lambda d: d.ellipse((80, 80, 176, 176), BLUE), background=(120, 190, 90))
    assert olive.background is None


def test_touching_objects_of_two_colors_are_separated():
    def draw_on(canvas):
        canvas.rectangle((60, 88, 127, 155), shapes.COLORS["red"])
        canvas.rectangle((128, 88, 195, 155), BLUE)

    seen = painted(draw_on)
    assert content(seen) == ("white", Counter({("square", "red"): 1, ("square", "blue"): 1}))


def test_touching_objects_of_one_color_are_not_counted_as_two():
    def draw_on(canvas):
        canvas.rectangle((60, 88, 127, 155), BLUE)
        canvas.rectangle((128, 88, 195, 155), BLUE)

    assert [thing.shape for thing in painted(draw_on).objects] == [None]


def test_an_object_cut_off_by_the_edge_is_not_recognised():
    cut = Object("circle", "red", 0.0, 32.0, 24.0)
    assert [t.shape for t in shapes.read(shapes.render(Scene("white", (cut,)))).objects] == [None]
    whole = replace(cut, x=13.0)
    seen = shapes.read(shapes.render(Scene("white", (whole,))))
    assert [thing.shape for thing in seen.objects] == ["circle"]


def test_specks_are_noise_and_larger_spots_are_objects():
    image = shapes.render(Scene("white", (Object("star", "red", 20, 20, 20),)))
    speckled, spotted = image.copy(), image.copy()
    speckled[50:53, 50:53] = BLUE
    spotted[50:56, 50:53] = BLUE
    assert len(shapes.read(speckled).objects) == 1
    assert len(shapes.read(spotted).objects) == 2


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 3), (64, 64, 4)])
def test_other_arrays_are_rejected(shape):
    with pytest.raises(ValueError, match=r"expected uint8 \[64, 64, 3\]"):
        shapes.read(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float64"):
        shapes.read(np.zeros((64, 64, 3)))
