"""Many verdicts to one table: accuracy per tag, and why the wrong images are wrong."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.worlds.shapes.benchmark import TAGS
from jaxdiff.worlds.shapes.verdict import Verdict, judge


@dataclass(frozen=True)
class TagScore:
    """One tag's counts; `reasons` counts the kinds of failure."""

    tag: str
    prompts: int
    images: int
    correct: int
    reasons: Counter

    @property
    def accuracy(self) -> float:
        """The share of images that are correct, 0 to 1."""
        return self.correct / self.images


def score(pairs: Iterable[tuple[dict, np.ndarray | None]]) -> list[TagScore]:
    """Judge (benchmark row, pixels uint8 [64, 64, 3]) pairs: a score for each tag that occurs.

    Pixels of None stand for an image that could not be made, which is wrong too. Raises InputError
    for a row that cannot be read.
    """
    prompts, images, correct, reasons = {}, Counter(), Counter(), {}
    for row, pixels in pairs:
        tag = row.get("tag")
        verdict = Verdict(False, "not made") if pixels is None else judge(row, pixels)
        if tag not in TAGS:
            raise InputError(f"benchmark row {row['prompt']!r}: tag must be one of {TAGS}: {tag!r}")
        prompts.setdefault(tag, set()).add(row["prompt"])
        images[tag] += 1
        correct[tag] += verdict.correct
        if not verdict.correct:
            reasons.setdefault(tag, Counter())[verdict.reason.split(":")[0]] += 1
    return [
        TagScore(tag, len(prompts[tag]), images[tag], correct[tag], reasons.get(tag, Counter()))
        for tag in TAGS
        if tag in images
    ]


def overall(scores: list[TagScore]) -> float:
    """The mean of the tags' accuracies, as in GenEval: every tag weighs the same."""
    return sum(tag.accuracy for tag in scores) / len(scores)


def table(scores: list[TagScore]) -> str:
    """The scores as a Markdown table with the three most frequent failures of each tag."""
    lines = [
        "| tag | prompts | images | correct | accuracy | most frequent failures |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for tag in scores:
        worst = ", ".join(f"{reason} {count}" for reason, count in tag.reasons.most_common(3))
        lines.append(
            f"| {tag.tag} | {tag.prompts} | {tag.images} | {tag.correct} "
            f"| {tag.accuracy:.3f} | {worst} |"
        )
    images, correct = sum(t.images for t in scores), sum(t.correct for t in scores)
    prompts = sum(t.prompts for t in scores)
    mean = overall(scores)
    lines.append(f"| **mean of the tags** | {prompts} | {images} | {correct} | **{mean:.3f}** | |")
    return "\n".join(lines)
