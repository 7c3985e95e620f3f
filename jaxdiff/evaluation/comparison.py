"""Computes what a report shows from scores: means by category, differences, failures."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from jaxdiff.evaluation import intervals, measures
from jaxdiff.evaluation.intervals import Difference, Estimate
from jaxdiff.evaluation.records import Prompt, Scores

CONFIDENCE = 0.95
NOT_MADE = "not made"
MOST_CATEGORIES = 1000  # with more, the categories are names of single prompts and are ignored


@dataclass(frozen=True)
class Mean:
    """A measure's mean in one category, or overall.

    Attributes:
      category: None for the overall mean, the mean of the category means.
      prompts, images: the numbers of those that have a value.
    """

    category: str | None
    estimate: Estimate
    prompts: int
    images: int


@dataclass(frozen=True)
class Change:
    """How much higher a measure is in a run than in the first; like `Mean`, over image pairs."""

    category: str | None
    difference: Difference
    prompts: int
    pairs: int


@dataclass(frozen=True)
class Comparison:
    """A comparison of a run with the first run.

    Attributes:
      name: the run's.
      pairs: the number of image pairs with the same prompt and seed.
      changes: by measure, overall first; without measures for which no pair has both values.
    """

    name: str
    pairs: int
    changes: dict[str, list[Change]]


@dataclass(frozen=True)
class Differing:
    """The image pairs in which a measure is higher in one of two runs than in the other.

    Attributes:
      higher: the name of the run in which it is higher.
      pairs: how many there are.
      largest: those that differ most, as the indices of their images in the first and second run.
    """

    higher: str
    pairs: int
    largest: list[tuple[int, int]]


@dataclass(frozen=True)
class Worst:
    """A prompt on which a run did badly; `images` are indices into the images of its scores."""

    prompt: Prompt
    value: float
    images: list[int]


def headline(runs: list[Scores]) -> str | None:
    """Returns the first measure of `measures.ALL` with values by image and a better direction."""
    judging = [name for name, measure in measures.ALL.items() if measure.better]
    return next((name for name in judging if any(name in run.values for run in runs)), None)


def failed(scores: Scores) -> np.ndarray:
    """Returns which images could not be generated: bool [images]."""
    unmeasured = np.ones(len(scores.keys), bool)
    for measure in measures.OF_IMAGES.keys() & scores.values.keys():
        unmeasured &= np.isnan(scores.values[measure])
    return unmeasured | (np.array(scores.reasons, object) == NOT_MADE)


def values_of(scores: Scores, measure: str) -> np.ndarray:
    """Returns a measure's values, float64 [images].

    For "correct", an image that could not be generated counts as wrong. For any other measure its
    value is NaN: it is left out of the mean and counted separately.
    """
    values = scores.values[measure]
    return np.where(failed(scores), 0.0, values) if measure == "correct" else values


def categories(prompts: list[Prompt]) -> tuple[list[str], np.ndarray]:
    """Returns the categories in the benchmark's order, and the index of each prompt's category.

    More than MOST_CATEGORIES are treated as one unnamed category.
    """
    numbers = {name: n for n, name in enumerate(dict.fromkeys(p.category for p in prompts))}
    if len(numbers) > MOST_CATEGORIES:
        return [""], np.zeros(len(prompts), int)
    return list(numbers), np.array([numbers[prompt.category] for prompt in prompts], int)


def summary(scores: Scores) -> dict[str, list[Mean]]:
    """Returns each measure's means with intervals over prompts: overall, then by category."""
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
    """Replaces the interval of a share by Wilson's if all bootstrap draws are equal.

    All draws are equal if all images are right, for example, but that does not make the share
    certain. Each prompt counts as one trial, as if its images were alike.
    """
    if not measures.ALL[measure].is_share or estimate.low != estimate.high:
        return estimate
    prompts = np.count_nonzero(counts)
    low, high = intervals.wilson(estimate.value * prompts, prompts, CONFIDENCE)
    return Estimate(estimate.value, float(low), float(high))


def compare(runs: list[Scores]) -> list[Comparison]:
    """Compares each run with the first, over image pairs with the same prompt and known seed."""
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
        # No pair differs, but that does not make a difference of 0 certain.
        difference = replace(difference, low=np.nan, high=np.nan)
    return Change(category, difference, int(np.count_nonzero(counts)), int(counts.sum()))


def _pairs(first: Scores, second: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the paired images in each run: int64 [pairs]."""
    there = {name: number for number, name in enumerate(_names(second)) if name[1] >= 0}
    pairs = [(n, there[name]) for n, name in enumerate(_names(first)) if name in there]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _names(scores: Scores) -> list[tuple[str, int]]:
    ids = [prompt.id for prompt in scores.prompts]
    owners, seeds = scores.owners.tolist(), scores.seeds.tolist()
    return [(ids[owner], seed) for owner, seed in zip(owners, seeds, strict=True)]


def differing(first: Scores, second: Scores, measure: str, n: int) -> list[Differing]:
    """Returns the pairs in which a measure is higher in the first run, and those in the second.

    Of each, at most n are listed: each prompt's largest difference, then its second largest, and so
    on; ties take from each category in turn. Pairs in which one has no value are left out.
    """
    of_first, of_second = _pairs(first, second)
    a, b = values_of(first, measure)[of_first], values_of(second, measure)[of_second]
    owners = first.owners[of_first].tolist()
    numbers = categories(first.prompts)[1].tolist()
    found = []
    for name, gains in ((first.name, a - b), (second.name, b - a)):
        times, before, ranked = Counter(), Counter(), []
        for pair in np.argsort(-gains, kind="stable").tolist():  # NaN last
            if not gains[pair] > 0:
                break
            rank = (times[owners[pair]], -gains[pair])
            turn = (*rank, numbers[owners[pair]])
            ranked.append((*rank, before[turn], pair))
            times[owners[pair]] += 1
            before[turn] += 1
        largest = [pair for *_, pair in sorted(ranked)[:n]]
        images = [(int(of_first[pair]), int(of_second[pair])) for pair in largest]
        found.append(Differing(name, len(ranked), images))
    return found


def worst(scores: Scores, measure: str, n: int) -> list[Worst]:
    """Returns the n prompts with the worst mean; ties take from each category in turn.

    Prompts with a perfect share are left out.
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
    """Counts the incorrect images by category and kind of failure.

    The kind is the part of an image's reason before the colon.
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
