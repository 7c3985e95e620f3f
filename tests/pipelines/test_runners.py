"""The choice of a Beam runner and its options, and the errors for invalid ones."""

import os
import subprocess
import sys

import apache_beam as beam
import pytest
from apache_beam.options import pipeline_options as beam_options
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from graphs import forks

from jaxdiff.errors import InputError
from pipelines import runners

SAYS = {
    ("--runner",): "argument --runner: expected one argument",
    ("--runner=Nope",): "unknown --runner Nope; known runners: FnApiRunner, DaskRunner, Dataflow",
    ("--runner=no.such.Runner",): "--runner no.such.Runner: No module named 'no'",
    ("--runner=builtins.int",): "--runner builtins.int is not a Beam runner",
    ("--direct_running_mode=multi_processing",): "use --workers N instead",
    ("--runner=direct", "--direct_running_mode", "multi_processing"): "use --workers N instead",
    ("--direct_running_mode=nonsense",): "invalid choice: 'nonsense'",
    ("--cfg", "3"): "unknown option --cfg; did you mean --guidance-scale?",
    ("--num_inference_steps=3",): "unknown option --num-inference-steps; did you mean --steps?",
    ("-n", "3"): "unknown option -n; did you mean --num-images?",
    ("--stepz", "3"): "unknown option --stepz; did you mean --steps?",
    ("--runner=DaskRunner", "--stepz=3"): "unknown option --stepz; did you mean --steps?",
    ("--runner=flink", "--stepz=3"): "unknown option --stepz; did you mean --steps?",
    ("--flink_master=host:8081",): "add --runner FlinkRunner",
    ("--spark_master_url", "spark://host"): "add --runner SparkRunner",
    ("--dask_client_address=tcp://host:8786",): "add --runner DaskRunner",
    ("--runner=direct", "--region=us-central1"): "add --runner DataflowRunner",
    ("--sdk_container_image=image",): "add --runner DataflowRunner",
    ("--dry_run=True",): "add --runner DataflowRunner",
    ("--num_workers=3",): "add --runner DataflowRunner, or use --workers",
    ("--environment_type=EXTERNAL",): "add --runner PortableRunner",
    ("--runner=flink", "--job_server_java_launcher=/no/java"): "needs /no/java to start its job",
    ("--runner=SparkRunner", "--job_server_java_launcher=/no/java"): "use --spark_submit_uber_jar",
}


@pytest.mark.parametrize("arguments", SAYS, ids=" ".join)
def test_an_error_is_one_line(arguments):
    with pytest.raises(InputError) as caught:
        runners.choose(list(arguments), workers=1)
    assert SAYS[arguments] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--runner=DirectRunner"], ["--runner", "fnapi"]])
def test_a_local_job_uses_the_fn_api_runner(arguments):
    runner, options = runners.choose(arguments, workers=1)
    assert type(runner) is FnApiRunner
    assert options.view_as(beam_options.DirectOptions).direct_running_mode == "in_memory"
    assert type(beam.Pipeline(runner=runner, options=options).runner) is FnApiRunner


def test_a_local_job_takes_options_for_remote_manifests():
    _, options = runners.choose(["--project=my-project", "--s3_region_name=eu"], workers=1)
    assert options.get_all_options()["project"] == "my-project"


def test_local_workers_have_threads_that_wait_for_them():
    _, options = runners.choose([], workers=3)
    direct = options.view_as(beam_options.DirectOptions)
    threads = 3 * runners.THREADS  # more threads spread the shards more evenly
    assert (direct.direct_running_mode, direct.direct_num_workers) == ("multi_threading", threads)


@pytest.mark.parametrize(
    "name", ["DaskRunner", "dask", "apache_beam.runners.dask.dask_runner.DaskRunner"]
)
def test_dask_takes_one_shard_at_a_time(name):
    runner, options = runners.choose([f"--runner={name}"], workers=1)
    assert type(runner).__name__ == "DaskRunner"
    assert options.get_all_options()["partition_size"] == 1


@pytest.mark.parametrize("said", [{"npartitions": 6}, {"partition_size": 2}])
def test_dask_partitions_can_be_set(said):
    ((name, value),) = said.items()
    _, options = runners.choose(["--runner=DaskRunner", f"--dask_{name}", str(value)], workers=1)
    found = options.get_all_options()
    assert {key: found[key] for key in ("npartitions", "partition_size") if found[key]} == said


@pytest.mark.parametrize("name", ["FlinkRunner", "SparkRunner", "PortableRunner"])
def test_unknown_options_are_left_to_a_job_server(name):
    arguments = [f"--runner={name}", "--job_endpoint=localhost:8099", "--fasterCopy=true"]
    runner, options = runners.choose(arguments, workers=2)
    assert type(runner).__name__ == name
    assert options.get_all_options(retain_unknown_options=True)["fasterCopy"] == "true"


@pytest.mark.parametrize(
    ("runner", "module", "extra"),
    [("DaskRunner", "distributed", "dask"), ("DataflowRunner", "apitools", "gcp")],
)
def test_a_missing_extra_is_named(runner, module, extra):
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from pipelines import runners; runners.choose(['--runner={runner}'], 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1].endswith(
        f"--runner {runner} is not installed: pip install 'jaxdiff[{extra}]'"
    )


def test_linear_graphs_and_forks_are_distinguished():
    straight = beam.Pipeline(runner=FnApiRunner())
    _ = straight | beam.Create([1], reshuffle=False) | beam.Reshuffle() | beam.Map(str)
    assert forks(straight) == []

    forked = beam.Pipeline(runner=FnApiRunner())
    ones = forked | "Ones" >> beam.Create([1], reshuffle=False)
    _ = ones | "Left" >> beam.Map(str)
    _ = ones | "Right" >> beam.Map(lambda x, side: x, beam.pvalue.AsList(ones))
    _ = ones | "Tagged" >> beam.ParDo(lambda x: [x]).with_outputs("bad", main="good")
    found = " ".join(forks(forked))
    assert "is used by 3 transforms" in found
    assert "Right has side inputs" in found
    assert "has the tagged outputs bad" in found

    joined = beam.Pipeline(runner=FnApiRunner())
    parts = [joined | f"Part{n}" >> beam.Create([n], reshuffle=False) for n in range(2)]
    _ = parts | beam.Flatten()
    assert forks(joined) == ["Flatten joins 2 inputs"]
