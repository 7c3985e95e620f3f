"""The shapes world, version 1: colored shapes on a plain background, with captions.

Rendered without end for training, and judged exactly in what a model makes of it. NumPy, Pillow
and SciPy only.
"""

from jaxdiff.worlds.shapes.captions import Caption, Group, draw_caption
from jaxdiff.worlds.shapes.perception import read
from jaxdiff.worlds.shapes.placement import sample, scene_for
from jaxdiff.worlds.shapes.render import render
from jaxdiff.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Object, Scene

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "RELATIONS",
    "SHAPES",
    "Caption",
    "Group",
    "Object",
    "Scene",
    "draw_caption",
    "read",
    "render",
    "sample",
    "scene_for",
]
