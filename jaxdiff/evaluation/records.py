"""What passes between the parts of an evaluation: prompts, pictures, scores."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A row of a benchmark.

    Attributes:
      id: its name in the benchmark, the scorer's own where it has one; no two are equal.
      text: what is to be shown.
      category: that the benchmark reports by; "" if it has none.
      row: as the benchmark's file has it, its keys in the file's order.
    """

    id: str
    text: str
    category: str
    row: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An image that was to show a prompt.

    Attributes:
      key: its name in the dataset.
      prompt: what it was to show.
      index: its number among the images of its prompt, from 0.
      seed: it was made from; -1 if nobody knows.
      image: its file's bytes; None if it could not be made.
      extension: of that file, such as "png".
    """

    key: str
    prompt: Prompt
    index: int
    seed: int
    image: bytes | None
    extension: str


@dataclass(frozen=True)
class Measure:
    """How a number is to be read.

    Attributes:
      title: what people call it.
      better: "higher", "lower" or "" if neither is.
      is_share: whether it lies between 0 and 1 and is shown as a percentage.
    """

    title: str
    better: str = "higher"
    is_share: bool = False


@dataclass(frozen=True)
class Scores:
    """What was measured of one run: of a model with its settings, over a benchmark.

    Attributes:
      name: tells it from the other runs.
      told: what is said of it, such as its model, fingerprint, steps and sampler.
      prompts: of the whole benchmark, in its order.
      keys, seeds: of the images, prompt by prompt, a prompt's images by their index.
      owners: int32 [images], which of `prompts` each image is of.
      values: by measure, float64 [images]; NaN where the image could not be made.
      reasons: by image, why it is wrong, in a few words; "" where it is right or nobody judged.
      whole: by measure, of the set of all images.
      missing: by measure that was asked for, why there is none, and the mend.
    """

    name: str
    told: dict[str, str]
    prompts: list[Prompt]
    keys: list[str]
    seeds: np.ndarray
    owners: np.ndarray
    values: dict[str, np.ndarray]
    reasons: list[str]
    whole: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
