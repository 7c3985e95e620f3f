"""Tests Flink, Spark and Dataflow without a cluster: the graph, the pickled DoFn, the options.

The commands are from docs/clusters.md.
"""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.internal import pickler
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult, PipelineRunner, PipelineState
from graphs import forks
from making import files, make_plan

from jaxdiff import cli
from jaxdiff.dataset.plan import Plan
from pipelines import generate_options, runners
from pipelines.shard_job import GenerateShard, make_shards

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text("utf-8")
MODELS = generate_options.Models("shapes64")
SECONDS = 60
OFFLINE = ("--dry_run=True", "--no_auth")  # otherwise, Dataflow's client queries its buckets


def documented(runner: str) -> list[list[str]]:
    """Returns the page's commands for a runner: the arguments after `jaxdiff generate`."""
    commands = re.findall(r"^jaxdiff generate ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    words = [shlex.split(command.replace("\\\n", " ")) for command in commands]
    return [found for found in words if runner in found]


def beam_arguments(command: list[str]) -> list[str]:
    return generate_options.parse(command)[1]


class Recorder(PipelineRunner):
    """Keeps its pipeline and runs nothing."""

    def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> PipelineResult:
        self.pipeline = pipeline
        result = PipelineResult(PipelineState.DONE)
        result.wait_until_finish = lambda duration=None: PipelineState.DONE
        return result


@pytest.fixture
def generate_shard(tmp_path, manifest, tiny_checkpoint) -> tuple[GenerateShard, Plan, list[int]]:
    run = make_plan(tmp_path, manifest, tiny_checkpoint, images_per_shard=8)
    made = GenerateShard(run, MODELS, generate_options.Workers(), "make")
    return made, run.plan, list(run.shards)


def test_the_graph_is_linear(generate_shard):
    recorder = Recorder()
    make_shards(*generate_shard, (recorder, PipelineOptions([])))
    assert forks(recorder.pipeline) == []
    labels = {node.full_label for node in leaves(recorder.pipeline)}
    assert "GenerateShard" in labels
    assert len(labels) > 3


def leaves(pipeline: beam.Pipeline) -> list:
    found = []

    class Visitor(beam.pipeline.PipelineVisitor):
        def visit_transform(self, node) -> None:
            found.append(node)

    pipeline.visit(Visitor())
    return found


def test_what_is_sent_to_workers_is_small_and_holds_no_model(generate_shard):
    dofn, _, _ = generate_shard
    assert len(pickler.dumps(dofn)) < 4096
    said = json.dumps(vars(dofn), default=vars)
    assert "shapes64" in said
    assert len(said) < 1024


@pytest.mark.parametrize("runner", ["DaskRunner", "FlinkRunner", "SparkRunner"])
def test_documented_commands_are_accepted(runner):
    (command,) = documented(runner)
    chosen, known = runners.choose([*beam_arguments(command), "--job_endpoint=localhost:1"], 2)
    assert type(chosen).__name__ == runner
    known = known.get_all_options()
    if runner != "DaskRunner":
        assert known["environment_type"] == "EXTERNAL"
        assert known["sdk_worker_parallelism"] == "1"


@pytest.fixture
def cluster(tmp_path, noisy) -> Iterator[tuple[int, int]]:
    """Yields the ports of Beam's own job server, in place of Flink's, and of a worker pool."""
    programs = Path(sys.executable).parent  # the pool runs the first `python` on the path
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    with contextlib.ExitStack() as ends:

        def start(module: str, option: str) -> int:
            port = free_port()
            process = subprocess.Popen(
                [sys.executable, "-m", f"apache_beam.runners.{module}", f"{option}={port}"],
                env=environment,
                stdout=ends.enter_context((tmp_path / f"{module}.log").open("w")),
                stderr=subprocess.STDOUT,
            )
            ends.callback(process.wait)
            ends.callback(process.terminate)
            return port

        ports = (
            start("portability.local_job_service_main", "--port"),
            start("worker.worker_pool_main", "--service_port"),
        )
        for port in ports:
            wait_for(partial(answers, port))
        yield ports


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def wait_for(something: Callable):
    deadline = time.monotonic() + SECONDS
    while not (found := something()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


def test_jobs_through_a_job_server_make_the_same_files(tmp_path, command, cluster):
    job_server, pool = cluster
    assert cli.main(command(tmp_path / "here", "--limit=8")) == 0
    for runner in ("FlinkRunner", "SparkRunner"):
        (page,) = documented(runner)
        said = [word.replace("localhost:50000", f"localhost:{pool}") for word in page]
        arguments = [*beam_arguments(said), f"--job_endpoint=localhost:{job_server}"]
        assert cli.main(command(tmp_path / runner, "--limit=8", *arguments)) == 0
        assert files(tmp_path / runner) == files(tmp_path / "here")
    started = (tmp_path / "worker.worker_pool_main.log").read_text()
    assert started.count("Starting worker with command") == 2


@pytest.mark.gcp
def test_dataflow_jobs_are_built_as_documented(generate_shard):
    commands = documented("DataflowRunner")
    assert len(commands) == 2
    for command in commands:
        runner, known = runners.choose([*beam_arguments(command), *OFFLINE], 4)
        began = time.monotonic()
        make_shards(*generate_shard, (runner, known))
        assert time.monotonic() - began < 10
        built = dataflow_environment(runner, known)
        (pool,) = built.worker_pools
        said = known.get_all_options()
        assert pool.num_threads_per_worker == 4
        assert pool.machine_type == said["machine_type"]
        (image,) = pool.sdk_harness_container_images
        assert image.container_image == said["sdk_container_image"]
        assert "no_use_multiple_sdk_containers" in built.experiments
        assert "use_multiple_sdk_containers" not in built.experiments
        (accelerator,) = built.service_options
        assert re.fullmatch(
            "worker_accelerator=type:(nvidia-l4;count:1;install-nvidia-driver"
            "|tpu-v5-lite-podslice;topology:1x1)",
            accelerator,
        )
        assert len(runner.proto_pipeline.SerializeToString()) < 64 * 1024


def dataflow_environment(runner: PipelineRunner, known: PipelineOptions):
    from apache_beam.runners.dataflow.internal import apiclient

    return apiclient.Environment([], known, "8", "gs://pipeline", runner.proto_pipeline).proto


@pytest.mark.gcp
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--project=123", "Invalid Project ID (123)"),
        ("--job_name=Ümlaut", "Invalid job_name"),
    ],
)
def test_dataflow_errors_are_one_line(wrong, named):
    command = [*beam_arguments(documented("DataflowRunner")[0]), *OFFLINE, wrong]
    with pytest.raises(runners.InputError) as caught:
        runners.choose(command, 1)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_documented_example_runs(tiny_checkpoint, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    example = example.replace("shapes64", str(tiny_checkpoint)).replace("seed=7", "seed=7, steps=2")
    exec(compile(example, "docs/clusters.md", "exec"), {"__name__": "example"})
    assert "a red star: (64, 64, 3)" in capsys.readouterr().out.splitlines()
