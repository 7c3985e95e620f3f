"""From the scores of runs to what a report tells: means by category, differences, failures."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from jaxdiff.evaluation import intervals, measures
from jaxdiff.evaluation.intervals import Difference, Estimate
from jaxdiff.evaluation.records import Prompt, Scores

CONFIDENCE = 0.95
NOT_MADE = "not made"
MOST_CATEGORIES = 1000  # what has more is no category but each prompt's name


@dataclass(frozen=True)
class Mean:
    """A measure's mean in one category, or overall.

    Attributes:
      category: None for the mean of all categories' means.
      prompts, images: that have a value.
    """

    category: str | None
    estimate: Estimate
    prompts: int
    images: int


@dataclass(frozen=True)
class Change:
    """How much higher a measure is in a run than in the first; as `Mean`, over pairs of images."""

    category: str | None
    difference: Difference
    prompts: int
    pairs: int


@dataclass(frozen=True)
class Comparison:
    """A run beside the first.

    Attributes:
      pairs: of images with equal prompt and seed.
      changes: by measure, overall first; none where no pair has both values.
    """

    name: str
    pairs: int
    changes: dict[str, list[Change]]


@dataclass(frozen=True)
class Worst:
    """A prompt that a run did badly; `images` are numbers of the scores' images."""

    prompt: Prompt
    value: float
    images: list[int]


def headline(runs: list[Scores]) -> str | None:
    """The first of `measures.ALL` that a run has by image and that says which run is better."""
    judging = [name for name, measure in measures.ALL.items() if measure.better]
    return next((name for name in judging if any(name in run.values for run in runs)), None)


def failed(scores: Scores) -> np.ndarray:
    """Which images could not be made; bool [images]."""
    unmeasured = np.ones(len(scores.keys), bool)
    for measure in measures.OF_IMAGES.keys() & scores.values.keys():
        unmeasured &= np.isnan(scores.values[measure])
    return unmeasured | (np.array(scores.reasons, object) == NOT_MADE)


def values_of(scores: Scores, measure: str) -> np.ndarray:
    """A measure's values, float64 [images]: an image that could not be made is a wrong one.

    Of any other measure it has no value: it is left out of the mean, and counted beside it.
    """
    values = scores.values[measure]
    return np.where(failed(scores), 0.0, values) if measure == "correct" else values


def categories(prompts: list[Prompt]) -> tuple[list[str], np.ndarray]:
    """The categories in the order of the benchmark, and each prompt's number among them.

    More than MOST_CATEGORIES are taken for none.
    """
    numbers = {name: n for n, name in enumerate(dict.fromkeys(p.category for p in prompts))}
    if len(numbers) > MOST_CATEGORIES:
        return [""], np.zeros(len(prompts), int)
    return list(numbers), np.array([numbers[prompt.category] for prompt in prompts], int)


def summary(scores: Scores) -> dict[str, list[Mean]]:
    """By measure its mean overall, and then in each category, with intervals over prompts."""
    names, numbers = categories(scores.prompts)
    means = {}
    for measure in (name for name in measures.ALL if name in scores.values):
        values = values_of(scores, measure)
        sums, counts = intervals.by_prompt(values, scores.owners, len(numbers))
        overall, each = intervals.bootstrap(sums, counts, numbers, CONFIDENCE)
        parts = [counts[inside] for inside in intervals.members(counts, numbers)]
        means[measure] = [
            _mean(category, _certain(measure, estimate, inside), inside)
            for category, estimate, inside in zip(
                [None, *names], [overall, *each], [counts, *parts], strict=True
            )
        ]
    return means


def _mean(category: str | None, estimate: Estimate, counts: np.ndarray) -> Mean:
    return Mean(category, estimate, int(np.count_nonzero(counts)), int(counts.sum()))


def _certain(measure: str, estimate: Estimate, counts: np.ndarray) -> Estimate:
    """The estimate; with Wilson's interval for a share of which no draw differs from another.

    So it is where all images are right: that makes it not certain that all would be. A prompt is
    taken for one trial, as if its images were alike.
    """
    if not measures.ALL[measure].is_share or estimate.low != estimate.high:
        return estimate
    prompts = np.count_nonzero(counts)
    low, high = intervals.wilson(estimate.value * prompts, prompts, CONFIDENCE)
    return Estimate(estimate.value, float(low), float(high))


def compare(runs: list[Scores]) -> list[Comparison]:
    """Each run beside the first, over the pairs of images of equal prompt and known, equal seed."""
    return [_compared(runs[0], run) for run in runs[1:]]


def _compared(first: Scores, second: Scores) -> Comparison:
    of_first, of_second = _pairs(first, second)
    names, numbers = categories(first.prompts)
    owners = first.owners[of_first]
    changes = {}
    for measure in (m for m in measures.ALL if m in first.values and m in second.values):
        a = values_of(first, measure)[of_first]
        b = values_of(second, measure)[of_second]
        counts = intervals.by_prompt(b - a, owners, len(numbers))[1]
        if not counts.any():
            continue
        overall, each = intervals.paired_difference(a, b, owners, numbers, CONFIDENCE)
        parts = [counts[inside] for inside in intervals.members(counts, numbers)]
        changes[measure] = list(map(_change, [None, *names], [overall, *each], [counts, *parts]))
    return Comparison(second.name, len(of_first), changes)


def _change(category: str | None, difference: Difference, counts: np.ndarray) -> Change:
    if difference.value == difference.low == difference.high == 0:
        # No pair differs: that does not make it certain that none ever would.
        difference = replace(difference, low=np.nan, high=np.nan)
    return Change(category, difference, int(np.count_nonzero(counts)), int(counts.sum()))


def _pairs(first: Scores, second: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the paired images in each; int64 [pairs]."""
    there = {name: number for number, name in enumerate(_names(second)) if name[1] >= 0}
    pairs = [(n, there[name]) for n, name in enumerate(_names(first)) if name in there]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _names(scores: Scores) -> list[tuple[str, int]]:
    ids = [prompt.id for prompt in scores.prompts]
    owners, seeds = scores.owners.tolist(), scores.seeds.tolist()
    return [(ids[owner], seed) for owner, seed in zip(owners, seeds, strict=True)]


def worst(scores: Scores, measure: str, n: int) -> list[Worst]:
    """The n prompts with the worst mean, among equals from each category in turn.

    A prompt that is wholly right is none of them.
    """
    _, numbers = categories(scores.prompts)
    sums, counts = intervals.by_prompt(values_of(scores, measure), scores.owners, len(numbers))
    read = measures.ALL[measure]
    ranked, before = [], Counter()
    for owner in np.flatnonzero(counts).tolist():
        value = sums[owner] / counts[owner]
        if read.is_share and value == (read.better != "lower"):
            continue
        turn = before[numbers[owner], value]
        before[numbers[owner], value] += 1
        ranked.append((-value if read.better == "lower" else value, turn, owner))
    return [
        Worst(
            scores.prompts[owner],
            float(sums[owner] / counts[owner]),
            np.flatnonzero(scores.owners == owner).tolist(),
        )
        for _, _, owner in sorted(ranked)[:n]
    ]


def failures(scores: Scores) -> dict[str, Counter]:
    """By category, how many of the images that are not correct are wrong in which way.

    The way is what stands before the colon of an image's reason.
    """
    kinds = {}
    if "correct" not in scores.values:
        return kinds
    names, numbers = categories(scores.prompts)
    for number in np.flatnonzero(values_of(scores, "correct") != 1).tolist():
        category = names[numbers[scores.owners[number]]]
        kind = scores.reasons[number].split(":")[0] or NOT_MADE
        kinds.setdefault(category, Counter())[kind] += 1
    return kinds
