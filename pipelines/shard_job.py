"""The Beam job that makes shards: a linear graph whose elements are shard numbers.

    Create(missing shards) | Reshuffle | ParDo(GenerateShard)

No pixel crosses a shuffle, and no runner is trusted with completeness: what is finished, the files
prove.
"""

import contextlib
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult, PipelineRunner

from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.store import absolute, open_store
from jaxdiff.errors import InputError
from pipelines import jobs, progress, supervisor
from pipelines.generate_options import Models, Workers
from pipelines.jobs import StoppedError
from pipelines.worker import Task

NAMESPACE = "jaxdiff"  # of the metrics


class GenerateShard(beam.DoFn):
    """Asks a worker to make each shard; yields statistics.

    Args:
      mode: as in `worker.Task`.
    """

    def __init__(self, run: Run, models: Models, workers: Workers, mode: str):
        self.directory, self.models = absolute(run.address), models
        self.workers, self.mode = workers, mode
        self.rejected = run.plan.rows["rejected"]
        self.last = run.shards[-1]  # rejected rows are counted with this shard

    def process(self, shard: int) -> Iterator[dict]:
        """Yields the result of `worker.make_shard`, and adds it to Beam's metrics."""
        task = Task(
            self.directory, vars(self.models), shard, self.mode, profile=self.workers.profile
        )
        done = supervisor.make_shard(task, self.workers)
        for name, value in done.items():
            if isinstance(value, int):
                Metrics.counter(NAMESPACE, name).inc(value)
            else:
                Metrics.counter(NAMESPACE, f"{name}_ms").inc(round(1000 * value))
        if shard == self.last:
            Metrics.counter(NAMESPACE, "rejected").inc(self.rejected)
        yield {"shard": shard, **done}


def make_shards(
    generate_shard: GenerateShard,
    plan: Plan,
    todo: list[int],
    beam_runner: tuple[PipelineRunner, PipelineOptions],
) -> PipelineResult | None:
    """Runs the Beam job for the shards in `todo`; returns its result, with the metrics.

    Raises:
      StoppedError, InputError, OSError, WorkerError: as in `supervisor.make_shard`.
    """
    if not todo:
        return None
    runner, beam_options = beam_runner
    shown, total = contextlib.nullcontext(), len(plan.shard_sizes)
    if generate_shard.mode == "make":
        shown = progress.shown(Run(open_store(generate_shard.directory), plan))
    else:
        jobs.say(f"{jobs.count(len(todo), 'shard')} of {total} to {generate_shard.mode}")
    try:
        with (
            shown,
            jobs.failures_raised(),
            beam.Pipeline(runner=runner, options=beam_options) as pipeline,
        ):
            shards = pipeline | "Shards" >> beam.Create(todo, reshuffle=False)
            _ = shards | beam.Reshuffle() | "GenerateShard" >> beam.ParDo(generate_shard)
        return pipeline.result
    except (StoppedError, InputError, OSError, supervisor.WorkerError):
        raise
    except Exception as failure:  # on a cluster, which reports a worker's error as text
        *_, last = str(failure).splitlines() or [type(failure).__name__]
        raise supervisor.WorkerError(last.partition(" [while running")[0]) from failure
