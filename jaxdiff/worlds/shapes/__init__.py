"""The shapes world, version 1: colored shapes on a plain background, with captions.

It supplies unlimited training images and judges a model's images exactly. It needs only NumPy,
Pillow and SciPy.
"""

from jaxdiff.worlds.shapes.benchmark import TAGS, benchmark_rows, caption_for, row_for
from jaxdiff.worlds.shapes.captions import Caption, Group, draw_caption
from jaxdiff.worlds.shapes.perception import read
from jaxdiff.worlds.shapes.placement import sample, scene_for
from jaxdiff.worlds.shapes.render import outlines, render
from jaxdiff.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Object, Scene
from jaxdiff.worlds.shapes.verdict import Verdict, judge

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "RELATIONS",
    "SHAPES",
    "TAGS",
    "Caption",
    "Group",
    "Object",
    "Scene",
    "Verdict",
    "benchmark_rows",
    "caption_for",
    "draw_caption",
    "judge",
    "outlines",
    "read",
    "render",
    "row_for",
    "sample",
    "scene_for",
]
