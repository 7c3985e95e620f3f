"""Scores models that take images, on held-out scenes of the shapes world.

    python -m tools.score_image_inputs outlines --controlnet shapes64-outlines
    python -m tools.score_image_inputs outlines
    python -m tools.score_image_inputs outlines --controlnet shapes64-outlines --upscale latent:1.5
    python -m tools.score_image_inputs inpainting --model runs/shapes64-inpainting/model

`outlines` draws the outlines of random scenes; an image follows them if it shows exactly their
objects, each in its shape and with its center within 3 px. Without a ControlNet, the model only has
the captions. `inpainting` hides an object of a scene and names another one instead; an image is
right if it shows exactly the objects of the new caption.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.evaluation.intervals import wilson
from jaxdiff.images import fitting
from jaxdiff.request import Request
from jaxdiff.training.loop import grid
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.captions import Caption, Group, pick
from jaxdiff.worlds.shapes.scene import CANVAS, Object, Scene, box
from jaxdiff.worlds.shapes.verdict import compare

SEED = 8  # of the scenes, which no recipe uses
WITHIN = 3.0  # px between the centers of an object and its outline
MARGIN = 6  # px around a hidden object, beyond the soft edge of what is pasted back
SHOWN = 32  # images in the picture
HIDDEN = 190  # the grey of masks in the picture, which is no background's


class Trial(NamedTuple):
    """A request, its caption as data, and the scene that it was drawn from."""

    request: Request
    caption: Caption
    scene: Scene


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=TRIALS)
    parser.add_argument("--model", default="shapes64")
    parser.add_argument("--controlnet")
    parser.add_argument("--upscale", help="such as latent:1.5; images are judged made small again")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--picture", type=Path, help="write the first images to this file")
    said = parser.parse_args(arguments)
    trials = [TRIALS[said.what](np.random.default_rng([SEED, i]), i) for i in range(said.scenes)]
    nets = [said.controlnet] if said.controlnet else []
    model = jaxdiff.load(said.model, controlnet=nets, upscale=said.upscale)
    requests = [trial.request for trial in trials]
    if said.what == "outlines" and not nets:
        requests = [Request(prompt=each.prompt, seed=each.seed) for each in requests]
    images = [fitting.fitted(image.pixels, CANVAS, CANVAS) for image in model.generate(requests)]
    found = [shapes.read(image) for image in images]
    pairs = [*zip(trials, found, strict=True)]
    if said.what == "outlines":
        report("objects in their places", [is_in_place(trial.scene, each) for trial, each in pairs])
    report("as the caption says", [compare(trial.caption, each).correct for trial, each in pairs])
    if said.what == "inpainting":
        report("the rest unchanged", [*map(keeps_the_rest, trials, images)])
    if said.picture:
        given = [trial.request.control_image for trial in trials]
        if said.what == "inpainting":
            given = [
                np.where(t.request.mask_image[..., None], HIDDEN, t.request.image) for t in trials
            ]
        shown = np.stack([*zip(given, images, strict=True)][:SHOWN]).astype(np.uint8)
        sheet = grid(shown.reshape(-1, CANVAS, CANVAS, 3), columns=16)
        Image.fromarray(sheet).resize([2 * side for side in sheet.shape[1::-1]], 0).save(
            said.picture
        )


def report(what: str, right: Sequence[bool]) -> None:
    """Prints how many are right, with the 95% confidence interval."""
    low, high = wilson(sum(right), len(right))
    print(f"{what}: {sum(right)} of {len(right)}, {np.mean(right):.1%} ({low:.1%} to {high:.1%})")


def outlined(rng: np.random.Generator, seed: int) -> Trial:
    """Draws a scene, which is given by its outlines and caption."""
    caption = shapes.draw_caption(rng)
    scene = shapes.scene_for(caption, rng)
    request = Request(prompt=caption.text(), seed=seed, control_image=shapes.outlines(scene))
    return Trial(request, caption, scene)


def repainted(rng: np.random.Generator, seed: int) -> Trial:
    """Draws a scene of one or two objects, of which the first is hidden and to be another one."""
    while True:
        groups = [Group(pick(rng, shapes.SHAPES), pick(rng, shapes.COLORS)) for _ in range(3)]
        named, hidden, *others = groups[: 2 + seed % 2]
        before = shapes.scene_for(Caption((hidden, *others)), rng)
        mask = _around(before.objects[0])
        if named != hidden and not any((_around(o, 1) & mask).any() for o in before.objects[1:]):
            break
    caption = Caption((named, *others))
    request = Request(
        prompt=caption.text(), seed=seed, image=shapes.render(before), mask_image=mask
    )
    return Trial(request, caption, before)


TRIALS: dict[str, Callable[[np.random.Generator, int], Trial]] = {
    "outlines": outlined,
    "inpainting": repainted,
}


def _around(thing: Object, margin: int = MARGIN) -> np.ndarray:
    """Returns a mask of the rectangle around an object, bool [64, 64]."""
    left, top, right, bottom = box(thing)
    rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
    return (abs(columns - (left + right) / 2) <= (right - left) / 2 + margin) & (
        abs(rows - (top + bottom) / 2) <= (bottom - top) / 2 + margin
    )


def is_in_place(wanted: Scene, found: Scene) -> bool:
    """Returns whether a scene has exactly the wanted objects, each in its shape and place."""
    left = [*found.objects]
    for thing in wanted.objects:
        near = [
            other
            for other in left
            if other.shape == thing.shape
            and np.hypot(other.x - thing.x, other.y - thing.y) <= WITHIN
        ]
        if not near:
            return False
        left.remove(near[0])
    return not left


def keeps_the_rest(trial: Trial, image: np.ndarray) -> bool:
    """Returns whether an image is unchanged outside of the mask."""
    mask = trial.request.mask_image
    return np.array_equal(image[~mask], trial.request.image[~mask])


if __name__ == "__main__":
    main()
