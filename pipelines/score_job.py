"""The Beam job that scores a run's images, one part after the other.

    Create(parts) | Reshuffle | ParDo(ScoreShard) | CombineGlobally(SummaryFn)

The scores of a part are kept in a file, so an interrupted evaluation can continue. Measures of a
whole set are combined from constant-size summaries.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import apache_beam as beam
import pyarrow as pa

from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.store import open_store
from jaxdiff.evaluation import datasets, scoring, sets
from jaxdiff.evaluation.layouts import folders
from jaxdiff.evaluation.records import Picture, Prompt
from jaxdiff.evaluation.scoring import Scoring
from pipelines import jobs, runners
from pipelines.jobs import StoppedError

SCORES = "scores"
SUMMARY = f"{SCORES}/summary.npz"


@dataclass(frozen=True)
class Images:
    """The location of a run's pictures: a dataset, or a folder in a benchmark's layout.

    Attributes:
      directory: of the dataset or the layout.
      layout: the layout's name; "" for a dataset.
      prompts: the benchmark's prompts, for a layout.
    """

    directory: str
    layout: str = ""
    prompts: tuple[Prompt, ...] = ()

    def parts(self) -> list[int]:
        """Returns the numbers of the parts, which are scored one by one."""
        return [0] if self.layout else list(run_at(self.directory).shards)

    def pictures(self, part: int) -> Iterator[Picture]:
        """Yields the pictures of a part; raises InputError for one that cannot be read."""
        folder = Path(self.directory)
        if self.layout:
            return folders.read_layout(self.layout, folder, list(self.prompts))
        return datasets.of_shard(run_at(self.directory), part)

    def digest(self, part: int) -> str:
        """Returns a string that identifies a part's pictures."""
        folder = Path(self.directory)
        if not self.layout:
            marker = shards.read_marker(run_at(self.directory), part)
            return json.dumps(marker.files, sort_keys=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        facts = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        return json.dumps([*facts, *(prompt.text for prompt in self.prompts)])


@lru_cache(8)
def run_at(directory: str) -> Run:
    """Opens a dataset to evaluate; the last ones stay open."""
    return datasets.open_dataset(directory)


class ScoreShard(beam.DoFn):
    """Scores parts by their numbers."""

    def __init__(self, images: Images, scored: Scoring, output: str):
        self.images, self.scored, self.output = images, scored, output

    def process(self, part: int) -> Iterator[sets.Summary]:
        """Yields the feature summary of the part's pictures."""
        table = None
        with jobs.failures_kept(), _lock:
            if jobs.stopping.is_set():
                raise StoppedError
            table = score_part(self.images, self.scored, self.output, part)
        if table is not None:
            yield sets.Summary.of(*scoring.features(table))


_lock = threading.Lock()  # one model per process, and one device call at a time


def score_part(images: Images, scored: Scoring, output: str | Path, part: int) -> pa.Table:
    """Returns the scores of a part, from its file in the output if that exists."""
    store, name = open_store(output), f"{SCORES}/{part:05d}.parquet"
    digest = scored.digest(images.digest(part))
    with store.fetched(name) as local:
        table = scoring.read_file(local.path(name), digest)
    if table is None:
        with store.filled() as folder:
            table = scoring.score_file(images.pictures(part), scored, folder / name, digest)
    return table


def score(images: Images, scored: Scoring, output: str, beam_arguments: list[str]) -> None:
    """Runs the Beam job, which writes one file per part and a summary; raises InputError."""
    runner, options = runners.choose(beam_arguments, 1)
    with jobs.failures_raised(), beam.Pipeline(runner=runner, options=options) as pipeline:
        parts = pipeline | "Parts" >> beam.Create(images.parts(), reshuffle=False)
        scores = parts | beam.Reshuffle() | beam.ParDo(ScoreShard(images, scored, output))
        summary = scores | beam.CombineGlobally(sets.summary_of_all)
        _ = summary | "Write" >> beam.Map(partial(_write_summary, output))


def _write_summary(output: str, summary: sets.Summary) -> None:
    with open_store(output).filled() as folder:
        (folder / SUMMARY).parent.mkdir(parents=True, exist_ok=True)
        summary.save(folder / SUMMARY)
