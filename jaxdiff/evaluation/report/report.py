"""Writes an evaluation's results: report.json in full, report.md and report.html for reading.

They have no timestamps or host names: the same scores give the same bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxdiff.evaluation import comparison, intervals, measures
from jaxdiff.evaluation.comparison import Change, Mean, Worst
from jaxdiff.evaluation.records import Prompt, Scores
from jaxdiff.evaluation.report import markdown
from jaxdiff.evaluation.report import page as pages
from jaxdiff.evaluation.report.examples import Pictures

SCHEMA = 1
WORST_PROMPTS, WORST_OF_A_RUN = 12, 4  # for all runs together; at least for each run
# Pairs that differ, of each run: by the first measure, for all comparisons together and at least
# for each one; by every other measure.
PAIRS, PAIRS_OF_A_COMPARISON, PAIRS_OF_OTHERS = 6, 3, 2


@dataclass(frozen=True)
class Table:
    """An additional table for a report: published scores or an audit's counts.

    Attributes:
      title, note: shown above the table; the note may be "".
      columns: the column names; the first column names the rows.
      rows: one cell for each column: text, a number, or None.
      sources: the name and address of each row's source; empty if rows have no sources.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    sources: Sequence[tuple[str, str]] = ()


def write(
    directory: Path,
    title: str,
    settings: dict[str, str],
    runs: Sequence[Scores],
    pictures: Pictures,
    tables: Sequence[Table] = (),
) -> dict:
    """Writes report.json, report.md and report.html, each atomically.

    Args:
      directory: the output folder; it may have other files.
      title: the benchmark's.
      settings: settings of the whole evaluation to show, for example the number of images.
      runs: at least one, all over the same prompts; the others are compared with the first.
      pictures: yields the files of a run's images: takes the run's name and the images' keys, and
        gives each key with its file, None if there is none. Called at most once for each run.
      tables: additional tables, for example published scores.

    Returns:
      the contents of report.json.
    """
    contents = contents_of(title, settings, runs, tables)
    page = pages.page(contents, pictures)
    text = json.dumps(contents, indent=1, allow_nan=False) + "\n"  # ASCII, so any text is valid
    _write(directory / "report.json", text)
    _write(directory / "report.md", markdown.document(contents))
    _write(directory / "report.html", page)
    return contents


def contents_of(
    title: str,
    settings: dict[str, str],
    runs: Sequence[Scores],
    tables: Sequence[Table] = (),
) -> dict:
    """Returns the contents of report.json; unknown values are None. Arguments as for `write`."""
    headline = comparison.headline(runs)
    named = {name for run in runs for name in (*run.values, *run.whole, *run.missing)}
    worst = max(WORST_OF_A_RUN, WORST_PROMPTS // len(runs))
    most = max(PAIRS_OF_A_COMPARISON, PAIRS // max(1, len(runs) - 1))
    return {
        "schema": SCHEMA,
        "benchmark": title,
        "told": settings,
        "confidence": comparison.CONFIDENCE,
        "resamples": intervals.RESAMPLES,
        "headline": headline,
        "measures": {name: asdict(measures.ALL[name]) for name in measures.ALL if name in named},
        "categories": comparison.categories(runs[0].prompts)[0],
        "runs": [_run(run, headline, worst) for run in runs],
        "comparisons": [
            {
                "name": compared.name,
                "to": runs[0].name,
                "pairs": compared.pairs,
                "measures": {
                    measure: [_change(change) for change in changes]
                    for measure, changes in compared.changes.items()
                },
                "differing": _differing(runs[0], run, compared.changes, most),
            }
            for run, compared in zip(runs[1:], comparison.compare(runs), strict=True)
        ],
        "tables": [asdict(table) for table in tables],
    }


def _run(run: Scores, headline: str | None, most: int) -> dict:
    worst = comparison.worst(run, headline, most) if headline in run.values else []
    return {
        "name": run.name,
        "told": run.settings,
        "prompts": len(run.prompts),
        "images": len(run.keys),
        "failed": int(comparison.failed(run).sum()),
        "measures": {
            measure: [_mean(mean) for mean in means]
            for measure, means in comparison.summary(run).items()
        },
        "whole": {name: _known(run.whole[name]) for name in measures.ALL if name in run.whole},
        "missing": run.missing,
        "failures": {
            category: dict(kinds.most_common())
            for category, kinds in comparison.failures(run).items()
        },
        "worst": [_worst(run, headline, prompt) for prompt in worst],
    }


def _mean(mean: Mean) -> dict:
    estimate = {name: _known(value) for name, value in asdict(mean.estimate).items()}
    return {
        "category": mean.category,
        **estimate,
        "prompts": mean.prompts,
        "images": mean.images,
    }


def _change(change: Change) -> dict:
    difference = {name: _known(value) for name, value in asdict(change.difference).items()}
    return {
        "category": change.category,
        **difference,
        "prompts": change.prompts,
        "pairs": change.pairs,
    }


def _differing(first: Scores, second: Scores, compared: Iterable[str], most: int) -> dict:
    """Returns the pairs that differ, by measure of images; at most `most` of each by the first."""
    found = {}
    for measure in (name for name in measures.OF_IMAGES if name in compared):
        n = PAIRS_OF_OTHERS if found else most
        found[measure] = [
            {
                "higher": differing.higher,
                "pairs": differing.pairs,
                "largest": _largest(first, second, measure, differing.largest),
            }
            for differing in comparison.differing(first, second, measure, n)
        ]
    return found


def _largest(
    first: Scores, second: Scores, measure: str, pairs: Sequence[tuple[int, int]]
) -> list[dict]:
    of_first = _images(first, measure, [number for number, _ in pairs])
    of_second = _images(second, measure, [number for _, number in pairs])
    return [
        _prompt(first.prompts[first.owners[number]]) | {"images": images}
        for (number, _), *images in zip(pairs, of_first, of_second, strict=True)
    ]


def _worst(run: Scores, measure: str, worst: Worst) -> dict:
    images = _images(run, measure, worst.images)
    return _prompt(worst.prompt) | {"value": worst.value, "images": images}


def _prompt(prompt: Prompt) -> dict:
    return {"id": prompt.id, "prompt": prompt.text, "category": prompt.category}


def _images(run: Scores, measure: str, numbers: Sequence[int]) -> list[dict]:
    values = comparison.values_of(run, measure)
    return [
        {
            "key": run.keys[number],
            "seed": int(run.seeds[number]),
            "value": _known(values[number]),
            "reason": run.reasons[number],
        }
        for number in numbers
    ]


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_text(text, "utf-8", "replace")  # lone surrogates become "?"
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
