"""The job behind `jaxdiff evaluate`: from a benchmark's prompts to a report.

    prompts   the benchmark's file -> manifest.jsonl
    images    pipelines.generate, one dataset per run
    scores    pipelines.score_job, one Beam job per run
    report    results.jsonl, the benchmark's layout, report.md, report.json, report.html

As in `encode`, CLIP runs in Beam's own process, as one instance behind a lock.

    python -m pipelines.evaluate --benchmark shapes --output out/judged
"""

import json
import shutil
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jaxdiff.dataset import run as dataset_runs
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.store import Store, absolute, is_address, join, open_store
from jaxdiff.errors import InputError
from jaxdiff.evaluation import (
    audits,
    benchmarks,
    best,
    clip_measures,
    cost,
    datasets,
    merging,
    results,
    sets,
)
from jaxdiff.evaluation.benchmarks import BENCHMARKS
from jaxdiff.evaluation.layouts import folders
from jaxdiff.evaluation.measures import OF_IMAGES
from jaxdiff.evaluation.published import PUBLISHED
from jaxdiff.evaluation.records import Picture, Prompt, Scores
from jaxdiff.evaluation.report import report, wording
from jaxdiff.evaluation.scoring import Scoring
from pipelines import command_line, evaluate_options, generate, inputs, runners
from pipelines.evaluate_options import Candidate, Evaluation, Export
from pipelines.jobs import (
    EXIT_OK,
    EXIT_SOME_IMAGES_FAILED,
    EXIT_STOPPED,
    StoppedError,
    stopped_by_signals,
)
from pipelines.score_job import SUMMARY, Images, run_at, score, score_part

MANIFEST = "manifest.jsonl"
IMAGES = "images"  # for layouts that allow no other files
BEST = "best"
AUDIT = "audit"
EXACT = "shapes"  # the benchmark that the shapes world's scorer judges
AT_THE_TOP = "geneval"  # the layout that allows other files in its folder


def run(asked: Evaluation | Export, beam_arguments: list[str]) -> int:
    """Evaluates, or continues an evaluation; returns the exit code.

    Raises:
      InputError: if the command or its input cannot be used.
      OSError: if the disk is full or a write fails; running the same command again continues.
    """
    if isinstance(asked, Export):
        return _export_dataset(asked)
    run_at.cache_clear()  # a dataset may have changed since an earlier evaluation
    if asked.images:
        prompts = benchmarks.read(
            asked.benchmark, asked.prompts, per_tag=asked.per_tag, seed=asked.prompts_seed
        )
    else:
        prompts, images = _of_datasets([each.images for each in asked.runs])
        asked = replace(asked, images=images)
    runners.choose(beam_arguments, 1)  # fails before anything is written
    if asked.clip:
        clip_measures.open_clip(asked.clip)
    _check(asked)
    reference = asked.reference and sets.read_reference(Path(asked.reference), asked.clip)
    code = _make_images(asked, prompts, beam_arguments)
    if code not in (EXIT_OK, EXIT_SOME_IMAGES_FAILED):
        return code
    try:
        with stopped_by_signals():
            judged = [
                _judge(asked, each, prompts, reference or None, beam_arguments)
                for each in asked.runs
            ]
    except StoppedError:
        print(f"jaxdiff: stopped; run the same command to continue {asked.output}", file=sys.stderr)
        return EXIT_STOPPED
    for each, (_, rows) in zip(asked.runs, judged, strict=True):
        if not _write_images(asked, each, prompts, rows):
            code = EXIT_SOME_IMAGES_FAILED
    _report(asked, prompts, judged)
    return code


def _of_datasets(addresses: list[str | Path]) -> tuple[list[Prompt], int]:
    """Returns the prompts of datasets, which must have the same ones, and the images of each."""
    (prompts, images), *others = (datasets.prompts_of(run_at(absolute(each))) for each in addresses)
    texts = {prompt.id: prompt.text for prompt in prompts}
    for address, (other, _) in zip(addresses[1:], others, strict=True):
        if {prompt.id: prompt.text for prompt in other} != texts:
            raise InputError(
                f"{address} has other prompts than {addresses[0]}; compare datasets that were made "
                "from the same manifest"
            )
    return prompts, images


def _check(asked: Evaluation) -> None:
    """Raises InputError for any run that cannot be made or judged, before the first one is."""
    for output in (asked.output, *(each.output for each in asked.runs)):
        if dataset_runs.find(output):
            raise InputError(
                f"--output: {output} is a dataset, which would no longer be whole with other files "
                "in it; name another directory"
            )
    for each in asked.runs:
        if each.job:
            with inputs.unreadable_named():
                generate.opened(each.job)
        elif not asked.is_layout:
            run_at(absolute(each.images))


def _make_images(asked: Evaluation, prompts: list[Prompt], beam_arguments: list[str]) -> int:
    """Generates the images of every run that does not have them; returns the exit code."""
    open_store(asked.output).prepare()
    code = EXIT_OK
    if asked.runs[0].job:
        rows = benchmarks.manifest_rows(prompts, asked.images)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        local = LocalStore(Path(asked.runs[0].job.manifest).parent)
        local.swap(MANIFEST, text)
        local.tidy()
    for each in asked.runs:
        if each.job and code in (EXIT_OK, EXIT_SOME_IMAGES_FAILED):
            code = max(code, generate.run(each.job, beam_arguments))
    return code


def _judge(
    asked: Evaluation,
    each: Candidate,
    prompts: list[Prompt],
    reference: sets.Summary | None,
    beam_arguments: list[str],
) -> tuple[Scores, pa.Table]:
    """Scores a run's pictures; returns the scores and a table with one row per image."""
    images = _images(asked, each, prompts)
    scored = Scoring(
        exact=asked.benchmark == EXACT,
        clip=asked.clip,
        clip_fingerprint=clip_measures.open_clip(asked.clip).fingerprint if asked.clip else "",
        labels=sets.labels(prompts),
    )
    score(images, scored, absolute(each.output), beam_arguments)

    def tables() -> Iterator[pa.Table]:
        return (score_part(images, scored, each.output, part) for part in images.parts())

    scores, rows = merging.merge(
        tables(),
        prompts,
        asked.images,
        name=each.name,
        settings=_settings(images) | _cost(each),
        with_clip=bool(asked.clip),
    )
    whole, missing = {}, {}
    if not asked.clip and asked.benchmark != EXACT:
        missing["clip_score"] = sets.HOW_TO_GET_CLIP
    if asked.benchmark == AUDIT and not (asked.clip and scored.labels):
        missing["label"] = "needs --clip, and labels in the template file"
    if reference:
        with open_store(each.output).fetched(SUMMARY) as local:
            summary = sets.Summary.load(local.path(SUMMARY))
        for measure, value in sets.against_reference(summary, reference, bool(asked.clip)):
            try:
                whole[measure] = value()
            except InputError as problem:
                missing[measure] = str(problem)
    if asked.training:
        whole |= sets.copies(tables(), asked.training)
    if asked.clip:
        whole |= sets.directions(tables(), prompts, asked.clip)
    return replace(scores, whole=whole, missing=missing), rows


def _images(asked: Evaluation, each: Candidate, prompts: list[Prompt]) -> Images:
    directory = absolute(each.images)
    if not asked.is_layout:
        return Images(directory)
    return Images(directory, BENCHMARKS[asked.benchmark].layout, tuple(prompts))


def _settings(images: Images) -> dict[str, str]:
    """Returns how a run's images were generated, for the report."""
    if images.layout:
        return {"images": Path(images.directory).name}
    plan = run_at(images.directory).plan
    said = {
        "model": plan.model_name,
        "fingerprint": plan.identity["model"][:16],
        **{name: plan.identity[name] for name in ("sampler", "steps", "guidance_scale", "seed")},
        "size": f"{plan.settings.width}x{plan.settings.height}",
        "options": plan.options,
    }
    return {name: str(value) for name, value in said.items() if value not in ("", None)}


def _cost(each: Candidate) -> dict[str, str]:
    """Returns what an image of a run that this command makes costs, for the report."""
    return cost.of_image(run_at(absolute(each.images)), each.job.models.open()) if each.job else {}


def _write_images(
    asked: Evaluation, each: Candidate, prompts: list[Prompt], rows: pa.Table
) -> bool:
    """Writes the files for other programs: results.jsonl, the benchmark's layout, the best images.

    Returns:
      whether all of them could be written.
    """
    images, store = _images(asked, each, prompts), open_store(each.output)
    layout = "" if asked.is_layout else BENCHMARKS[asked.benchmark].layout

    def every() -> Iterator[Picture]:
        return (picture for part in images.parts() for picture in images.pictures(part))

    with store.filled(*_replaced(store, layout, asked.keep)) as folder:
        if asked.benchmark == EXACT:
            text = "".join(line + "\n" for line in results.lines(rows, prompts, each.output))
            LocalStore(folder).swap(results.RESULTS, text)
            LocalStore(folder).tidy()
        if asked.keep:
            measured = [measure for measure in OF_IMAGES if rows[measure].null_count < len(rows)]
            kept = best.write(folder / BEST, rows, prompts, every(), asked.keep, measured)
            print(f"best of {asked.images}: wrote {kept} images to {join(each.output, BEST)}")
        if layout:
            return _export(layout, every(), prompts, asked.images, folder)
    return True


def _replaced(store: Store, layout: str, keep: str) -> list[str]:
    """Returns the folders of images that an earlier evaluation may have left."""
    numbered = (entry for entry in store.entries("") if entry.isdigit())
    of_layout = numbered if layout == AT_THE_TOP else [IMAGES] * bool(layout)
    return [*of_layout, *[BEST] * bool(keep)]


def _export(
    layout: str, pictures: Iterator[Picture], prompts: list[Prompt], images: int, folder: Path
) -> bool:
    """Writes a benchmark's layout; returns whether it could be written."""
    try:
        if layout == AT_THE_TOP:
            folders.export(layout, pictures, prompts, images, folder, beside_others=True)
        else:
            shutil.rmtree(folder / IMAGES, ignore_errors=True)
            folders.export(layout, pictures, prompts, images, folder / IMAGES)
    except InputError as problem:
        print(f"jaxdiff: layout {layout} was not written: {problem}", file=sys.stderr)
        return False
    return True


def _report(
    asked: Evaluation, prompts: list[Prompt], judged: list[tuple[Scores, pa.Table]]
) -> None:
    benchmark = BENCHMARKS[asked.benchmark]
    sources = {each.name: _images(asked, each, prompts) for each in asked.runs}
    with open_store(asked.output).filled() as folder:
        contents = report.write(
            folder,
            benchmark.title,
            {
                "source": benchmark.paper,
                "prompts": str(len(prompts)),
                "images per prompt": str(asked.images),
                "CLIP": _clip_said(asked.clip),
                "reference": asked.reference,
                "training set": asked.training,
            },
            [scores for scores, _ in judged],
            partial(_pictures, sources, {scores.name: rows for scores, rows in judged}),
            _tables(asked.benchmark, prompts, judged),
        )
    missing = (pair for scores, _ in judged for pair in scores.missing.items())
    for measure, why in dict.fromkeys(missing):  # once, whatever the number of runs
        print(f"jaxdiff: no {measure}: {why}", file=sys.stderr)
    for line in wording.summary(contents):
        print(line)
    print(f"Report: {join(asked.output, 'report.html')}")


def _clip_said(model: str) -> str:
    if not model:
        return ""
    tower = clip_measures.open_clip(model)
    return f"{tower.name}, {tower.fingerprint[:16]}; CLIPScore is 100 max(cos, 0)"


def _tables(
    benchmark: str, prompts: list[Prompt], judged: list[tuple[Scores, pa.Table]]
) -> list[report.Table]:
    """Returns the report's additional tables: published scores, or an audit's counts."""
    tables = [PUBLISHED[benchmark]] if benchmark in PUBLISHED else []
    for scores, rows in judged:
        said = rows["said"].to_pylist()
        if benchmark == AUDIT and any(said):
            table = audits.counts(prompts, scores.owners, said)
            tables.append(replace(table, title=f"{table.title}: {scores.name}"))
    return tables


def _pictures(
    sources: dict[str, Images], rows: dict[str, pa.Table], run: str, keys: Collection[str]
) -> Iterator[tuple[str, bytes | None]]:
    """Yields a run's images with these keys, None for one that could not be generated.

    Each part is read once at most.
    """
    is_asked = pc.is_in(rows[run]["key"], pa.array(keys))
    for part in rows[run]["part"].filter(is_asked).unique().to_pylist():
        for picture in sources[run].pictures(part):
            if picture.key in keys:
                yield picture.key, picture.image


def _export_dataset(asked: Export) -> int:
    """Writes a dataset in a benchmark's layout."""
    prompts, images = datasets.prompts_of(datasets.open_dataset(asked.dataset))
    store, pictures = open_store(asked.output), datasets.of_dataset(asked.dataset)
    if is_address(asked.output):
        store.prepare()
        if store.entries(""):
            raise InputError(f"{asked.output} holds other objects; name a new prefix")
    with store.filled() as folder:
        made = folders.export(asked.layout, pictures, prompts, images, folder)
    print(f"wrote {made} images to {asked.output} in layout {asked.layout}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(command_line.run(lambda said: run(*evaluate_options.parse(said)), sys.argv[1:]))
