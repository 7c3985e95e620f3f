"""`jaxdiff verify` as a Beam job, for datasets that are too large for one machine.

    Create(shards) | Reshuffle | ParDo(CheckShard) | ToList | Write

What concerns the whole dataset is checked in the launching process. No runner returns what a job
finds, nor is one trusted with completeness: the findings come back in a file in `names.TMP`, and a
shard that is not in it counts as a problem.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineRunner

from jaxdiff.dataset import ledger, names
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.dataset.store import absolute, open_store
from pipelines import jobs, runners
from pipelines.jobs import StoppedError, stopped_by_signals


class CheckShard(beam.DoFn):
    """Checks each shard as `ledger.verify` does; yields its number and its problems."""

    def __init__(self, address: str):
        self.address = address

    def setup(self) -> None:
        """Opens the run, once for each copy of this object."""
        self.run = open_run(self.address)

    def process(self, shard: int) -> Iterator[tuple[int, list[str]]]:
        """Yields nothing if the shard cannot be read; the error ends the job."""
        with jobs.failures_kept():
            if jobs.stopping.is_set():
                raise StoppedError
            yield shard, [*ledger.check_shard(self.run, shard, deep=True)]


def verify(where: str | Path, beam_arguments: list[str]) -> tuple[dict[str, int], list[str]]:
    """Checks a finished dataset like `ledger.verify`, its shards in a Beam job.

    Args:
      where: the dataset's directory or address, which all workers can reach.
      beam_arguments: as in `runners.choose`.

    Returns:
      The counts, and the problems in the order of `ledger.verify`.

    Raises:
      InputError: if there is no run, its plan cannot be used, or Beam's options cannot.
      OSError: if a shard cannot be read, or the findings cannot be written.
      StoppedError: after a signal.
    """
    beam_runner = runners.choose(beam_arguments, 1)  # fails before anything is read
    return ledger.verify(where, partial(_check_shards, beam_runner=beam_runner))


def _check_shards(run: Run, beam_runner: tuple[PipelineRunner, PipelineOptions]) -> list[str]:
    """Runs the Beam job; returns the problems of all shards, in the order of the shards."""
    (runner, options), address, store = beam_runner, absolute(run.address), run.store
    name = f"{names.TMP}/{store.scratch('findings').name}"  # where lost processes may leave files
    try:
        with (
            stopped_by_signals(),
            jobs.failures_raised(),
            beam.Pipeline(runner=runner, options=options) as pipeline,
        ):
            shards = pipeline | "Shards" >> beam.Create(run.shards, reshuffle=False)
            found = shards | beam.Reshuffle() | beam.ParDo(CheckShard(address))
            listed = found | beam.combiners.ToList()
            _ = listed | "Write" >> beam.Map(partial(_write, address, name))
        is_written = store.kind(name) is None
        findings = dict(json.loads(store.read(name))) if is_written else {}
    finally:
        store.delete(name)
        with contextlib.suppress(OSError):  # others may be using it
            store.work().rmdir()
    return [  # workers have other working directories; say it as this process would
        problem.replace(address, run.address)
        for shard in run.shards
        for problem in findings.get(shard, [f"shard {shard} was not checked; check it again"])
    ]


def _write(address: str, name: str, findings: list[tuple[int, list[str]]]) -> None:
    """Writes the findings; a runner may call this twice with the same ones."""
    open_store(address).claim(name, json.dumps(findings))
