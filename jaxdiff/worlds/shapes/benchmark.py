"""Converts captions to benchmark rows in GenEval's schema, and rows to captions.

A row is `{"tag", "include", "exclude"?, "background"?, "prompt"}`. `include` is a list of
`{"class", "count", "color"?, "position"?}` as in GenEval (arXiv 2310.11513). For a relation, the
second entry has a position relative to the first, `["above", 0]` for "above entry 0", so "a star
above a circle" includes a circle and then a star. `exclude` is only in counting rows. `background`
is this world's own field, present only if the prompt names a background.
"""

import itertools

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.worlds.shapes.captions import NUMBERS, Caption, Group
from jaxdiff.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def benchmark_rows(tag: str, count: int, seed: int) -> list[dict]:
    """Draws `count` rows of one tag of `TAGS`; no prompt repeats before all have been used.

    The background is unspecified or one of the three, all four equally often. The two objects of a
    pair have different shapes and, in color_attr, different colors, as in GenEval.
    """
    captions = _captions(tag)
    order = np.random.default_rng([seed, TAGS.index(tag)]).permutation(len(captions))
    return [row_for(captions[order[i % len(order)]]) for i in range(count)]


def _captions(tag: str) -> list[Caption]:
    pairs = list(itertools.permutations(SHAPES, 2))
    color_pairs = list(itertools.permutations(COLORS, 2))
    groups = {
        "single_object": [(Group(s),) for s in SHAPES],
        "two_object": [(Group(s), Group(t)) for s, t in pairs],
        "counting": [(Group(s, c, n),) for s in SHAPES for c in (None, *COLORS) for n in NUMBERS],
        "colors": [(Group(s, c),) for s in SHAPES for c in COLORS],
        "position": [(Group(s), Group(t)) for s, t in pairs],
        "color_attr": [(Group(s, c), Group(t, d)) for s, t in pairs for c, d in color_pairs],
    }[tag]
    relations = RELATIONS if tag == "position" else (None,)
    backgrounds = (None, *BACKGROUNDS)
    return [Caption(g, r, b) for g, r, b in itertools.product(groups, relations, backgrounds)]


def row_for(caption: Caption) -> dict:
    """Returns the row of any caption of the grammar, with the tag that tests most of it."""
    include = [_entry(group) for group in caption.groups]
    if caption.relation:
        include.reverse()
        include[1]["position"] = [caption.relation, 0]
    row = {"tag": _tag(caption), "include": include}
    if row["tag"] == "counting":
        group = caption.groups[0]
        row["exclude"] = [{"class": group.shape, "count": group.count + 1}]
    if caption.background:
        row["background"] = caption.background
    return row | {"prompt": caption.text()}


def _tag(caption: Caption) -> str:
    first = caption.groups[0]
    if caption.relation:
        return "position"
    if len(caption.groups) == 2:
        return "color_attr" if first.color else "two_object"
    if first.count > 1:
        return "counting"
    return "colors" if first.color else "single_object"


def _entry(group: Group) -> dict:
    color = {"color": group.color} if group.color else {}
    return {"class": group.shape, "count": group.count} | color


def caption_for(row: dict) -> Caption:
    """Returns the caption that a row describes.

    Reads only `include` and `background`; `exclude` adds nothing to a strict judgment.

    Raises:
      InputError: for a row that this world's grammar cannot express.
    """

    def require(fine: bool, field: str, value) -> None:
        if not fine:
            name = f"benchmark row {row.get('prompt')!r}"
            raise InputError(
                f"{name}: {field} {value!r} is not in the shapes world; use a value that is"
            )

    include, background = row.get("include"), row.get("background")
    require(isinstance(include, list) and len(include) in (1, 2), "include", include)
    require(background in (None, *BACKGROUNDS), "background", background)
    groups = []
    for entry in include:
        require(isinstance(entry, dict), "include", entry)
        shape, color, count = entry.get("class"), entry.get("color"), entry.get("count")
        require(shape in SHAPES, "class", shape)
        require(color in (None, *COLORS), "color", color)
        require(type(count) is int and count in (1, *NUMBERS), "count", count)
        groups.append(Group(shape, color, count))
    position = include[-1].get("position")
    if position is None:
        return Caption(tuple(groups), None, background)
    placed = isinstance(position, list) and len(position) == 2 and len(groups) == 2
    require(placed and position[0] in RELATIONS and position[1] == 0, "position", position)
    return Caption(tuple(reversed(groups)), position[0], background)
