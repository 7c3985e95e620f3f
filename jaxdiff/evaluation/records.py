"""The records that the parts of an evaluation exchange: prompts, pictures, scores."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
      id: its unique name in the benchmark; the scorer's own name if it has one.
      text: what the image should show.
      category: the benchmark's category for reports; "" if it has none.
      row: its row in the benchmark's file, with the keys in the file's order.
    """

    id: str
    text: str
    category: str
    row: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """An image generated for a prompt.

    Attributes:
      key: its name in the dataset.
      prompt: what it should show.
      index: its number among the images of its prompt, from 0.
      seed: the seed it was generated from; -1 if unknown.
      image: its file's bytes; None if it could not be generated.
      extension: the file's extension, for example "png".
    """

    key: str
    prompt: Prompt
    index: int
    seed: int
    image: bytes | None
    extension: str


@dataclass(frozen=True)
class Measure:
    """How to read a measured number.

    Attributes:
      title: its name in reports.
      better: "higher", "lower", or "" if neither is better.
      is_share: whether it is between 0 and 1 and shown as a percentage.
    """

    title: str
    better: str = "higher"
    is_share: bool = False


@dataclass(frozen=True)
class Scores:
    """The scores of one run: a model with its settings, over a benchmark.

    Attributes:
      name: distinguishes it from the other runs.
      settings: for the report: model, fingerprint, steps, sampler, and so on.
      prompts: all prompts of the benchmark, in its order.
      keys, seeds: of the images, ordered by prompt, then by index.
      owners: int32 [images], the index in `prompts` of each image's prompt.
      values: by measure, float64 [images]; NaN where the image could not be generated.
      reasons: by image, why it is wrong, in a few words; "" if it is right or was not judged.
      whole: by measure, the value for the set of all images.
      missing: by requested measure, why it has no value and how to fix that.
    """

    name: str
    settings: dict[str, str]
    prompts: list[Prompt]
    keys: list[str]
    seeds: np.ndarray
    owners: np.ndarray
    values: dict[str, np.ndarray]
    reasons: list[str]
    whole: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
