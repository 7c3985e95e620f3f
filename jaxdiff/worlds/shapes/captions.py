"""The caption grammar: captions as data and as sentences."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from jaxdiff.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}

# How often `draw_caption` uses each template. Counts are the hardest to learn, and color binding in
# pairs takes the longest, so these templates are not rarer than those with a single object.
TEMPLATES = {
    "a {shape}": 0.10,
    "a {color} {shape}": 0.24,
    "a {shape} and a {shape}": 0.12,
    "{number} {shapes}": 0.08,
    "{number} {color} {shapes}": 0.10,
    "a {shape} {relation} a {shape}": 0.12,
    "a {color} {shape} and a {color} {shape}": 0.12,
    "a {color} {shape} {relation} a {color} {shape}": 0.12,
}
BACKGROUND_RATE = 0.5  # of the captions that name the background


@dataclass(frozen=True)
class Group:
    """A group of `count` objects of one shape; a color of None allows any color for each object."""

    shape: str
    color: str | None = None
    count: int = 1

    def text(self) -> str:
        """Returns the group with its article or number: "an orange star", "three rings"."""
        color = f"{self.color} " if self.color else ""
        if self.count > 1:
            return f"{NUMBERS[self.count]} {color}{PLURALS[self.shape]}"
        words = f"{color}{self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Caption:
    """One or two groups, the first one's relation to the second, and the background.

    None leaves the relation or the background unspecified.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def text(self) -> str:
        """Returns the sentence: "a red star above an orange ring on a black background"."""
        joint = f" {self.relation or 'and'} "
        ending = f" on a {self.background} background" if self.background else ""
        return joint.join(group.text() for group in self.groups) + ending


def draw_caption(
    rng: np.random.Generator, templates: Collection[str] = tuple(TEMPLATES)
) -> Caption:
    """Draws a caption: a template with the weights of `TEMPLATES`, and words uniformly.

    A template that is listed twice is drawn twice as often.
    """
    cumulative = np.cumsum([TEMPLATES[name] for name in templates])
    index = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    template = tuple(templates)[min(index, len(templates) - 1)]
    background = pick(rng, BACKGROUNDS) if rng.random() < BACKGROUND_RATE else None
    return fill(template, rng, background)


def fill(template: str, rng: np.random.Generator, background: str | None = None) -> Caption:
    """Fills a template of `TEMPLATES` with uniformly drawn words."""
    colored = "{color}" in template
    count = pick(rng, NUMBERS) if "{number}" in template else 1
    groups = tuple(
        Group(pick(rng, SHAPES), pick(rng, COLORS) if colored else None, count)
        for _ in range(template.count("{shape"))
    )
    relation = pick(rng, RELATIONS) if "{relation}" in template else None
    return Caption(groups, relation, background)


def pick(rng: np.random.Generator, options):
    """Draws one of `options` uniformly."""
    return tuple(options)[int(rng.random() * len(options))]
