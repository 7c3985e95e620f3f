"""Which of Beam's runners a job has, and with what options: from the arguments left for Beam.

A job at home is always the `FnApiRunner`. The `DirectRunner` that Beam takes when it is told
nothing downloads another runner if it can, so the same command would run differently offline.
"""

import contextlib
import importlib.util
import io
import shutil

from apache_beam.options import pipeline_options as beam_options
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineRunner

from jaxdiff.errors import InputError
from pipelines import generate_options as job_options

THREADS = 8  # of Beam's a worker: it deals shards out beforehand, one by one to each
AT_HOME = ("DirectRunner", "SwitchingDirectRunner", "FnApiRunner")
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"  # Beam does not know it by its short name
# What a runner needs that is not in every installation: a module of it, and the extra with it.
EXTRAS = {"DaskRunner": ("distributed", "dask"), "DataflowRunner": ("apitools", "gcp")}
# Options that mean nothing at home, and the runner that they are meant for.
OWNERS = {
    beam_options.FlinkRunnerOptions: "FlinkRunner",
    beam_options.SparkRunnerOptions: "SparkRunner",
    beam_options.PrismRunnerOptions: "PrismRunner",
    beam_options.GoogleCloudOptions: "DataflowRunner",
    beam_options.WorkerOptions: "DataflowRunner",
    beam_options.TestOptions: "DataflowRunner",
    beam_options.PortableOptions: "PortableRunner",
    beam_options.JobServerOptions: "PortableRunner",
}
FOR_FILES = ("project", "no_auth", "impersonate_service_account", "gcp_oauth_scopes")  # at gs://


def choose(arguments: list[str], workers: int) -> tuple[PipelineRunner, PipelineOptions]:
    """Reads what `options.parse` has left for Beam.

    Args:
      arguments: such as ["--runner=FlinkRunner", "--flink_master=host:8081"].
      workers: processes that make images, in each process of Beam's.

    Returns:
      The runner, which is the `FnApiRunner` unless another is named, and its options. At home it
      has some threads for each worker to wait in.

    Raises:
      InputError: for an option or a runner that is unknown, that does not belong to the other or
        cannot be trusted with a job, or that is not installed.
    """
    name = _runner_name(arguments)
    if name in (None, *AT_HOME):
        return FnApiRunner(), _options_at_home(arguments, workers)
    if name in EXTRAS:
        module, extra = EXTRAS[name]
        if importlib.util.find_spec(module) is None:
            raise InputError(f"--runner {name} is not installed: pip install 'jaxdiff[{extra}]'")
    try:
        runner = create_runner(DASK if name == "DaskRunner" else name)
    except ValueError:
        known = ", ".join(["FnApiRunner", "DaskRunner", *sorted({*OWNERS.values()})])
        raise InputError(f"unknown --runner {name}; Beam's are {known}") from None
    except (AttributeError, ImportError, TypeError) as problem:
        raise InputError(f"--runner {name}: {problem}") from None
    if not isinstance(runner, PipelineRunner):
        raise InputError(f"--runner {name} is not a runner of Beam's")
    arguments = [*_defaults(name, arguments, workers), *arguments]
    options = PipelineOptions(arguments)
    _refuse_unknown(options, with_runner=runner)
    if problems := PipelineOptionsValidator(options, runner).validate():
        raise InputError(f"--runner {name}: {'; '.join(problems)}".rstrip("."))
    _need_java(name, options)
    return runner, options


def _runner_name(arguments: list[str]) -> str | None:
    """As Beam spells it, where the name is one that needs care: `dask` is the DaskRunner."""
    options = PipelineOptions(arguments)
    _parse(options)
    said = options.view_as(beam_options.StandardOptions).runner
    if said is None:
        return None
    last = (said.rpartition(".")[2] if said.startswith("apache_beam.") else said).lower()
    ours = {known.lower(): known for known in (*AT_HOME, *EXTRAS, *OWNERS.values())}
    return ours.get(last, ours.get(f"{last}runner", said))


def _options_at_home(arguments: list[str], workers: int) -> PipelineOptions:
    options = PipelineOptions(arguments)
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag.startswith("--dask_"):
            raise InputError(f"{flag} is an option of DaskRunner: add --runner DaskRunner")
    _refuse_unknown(options)
    for owned, owner in OWNERS.items():
        said = options.view_as(owned).get_all_options(drop_default=True, current_only=True)
        for name in said.keys() - FOR_FILES:
            ours = name.removeprefix("num_")
            meant = f", or say --{ours.replace('_', '-')}" * (ours in job_options.OPTIONS)
            raise InputError(f"--{name} is an option of {owner}: add --runner {owner}{meant}")
    direct = options.view_as(beam_options.DirectOptions)
    if direct.direct_running_mode == "multi_processing":
        raise InputError(
            "--direct_running_mode multi_processing waits for ever when a process dies: "
            "say --workers N instead"
        )
    if workers > 1:
        direct.direct_running_mode, direct.direct_num_workers = "multi_threading", THREADS * workers
    return options


def _defaults(name: str, arguments: list[str], workers: int) -> list[str]:
    """What a runner must be told for shards to be spread evenly, and a device to be held once."""
    said = {argument.partition("=")[0] for argument in arguments}
    if name == "DaskRunner" and not said & {"--dask_partition_size", "--dask_npartitions"}:
        return ["--dask_partition_size=1"]
    if name == "DataflowRunner":  # else a process for each core, each with the model
        threads = f"--number_of_worker_harness_threads={workers}"
        return ["--experiments=no_use_multiple_sdk_containers", threads]
    return []


def _refuse_unknown(options: PipelineOptions, with_runner: PipelineRunner | None = None) -> None:
    """A runner on the JVM may have options of its own, but a misspelt one of ours is no such."""
    known, every = _parse(options)
    for name in every:
        meant = job_options.suggest(name)
        if name not in known and (meant or not isinstance(with_runner, PortableRunner)):
            said = f"--{name.replace('_', '-')}"
            if meant.endswith(f"{said}?"):  # this command is another
                raise InputError(f"{said} is an option of jaxdiff generate alone")
            raise InputError(f"unknown option {said}{meant}")


def _parse(options: PipelineOptions) -> tuple[dict, dict]:
    """The options that Beam knows, and those with what it does not know."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return options.get_all_options(), options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        last = (said.getvalue().splitlines() or ["they cannot be read"])[-1]
        raise InputError(f"Beam's options: {last.rpartition('error: ')[2]}") from None


def _need_java(name: str, options: PipelineOptions) -> None:
    """Flink's and Spark's jobs are handed in by a server on the JVM, which Beam starts here."""
    uber_jar = {"FlinkRunner": "flink_submit_uber_jar", "SparkRunner": "spark_submit_uber_jar"}
    said = options.get_all_options()
    if name not in uber_jar or said[uber_jar[name]] or said["job_endpoint"]:
        return
    java = said["job_server_java_launcher"]
    if not shutil.which(java):
        raise InputError(
            f"--runner {name} needs {java} to start its job server: install a Java runtime, "
            f"name a running one with --job_endpoint HOST:PORT, or say --{uber_jar[name]}"
        )
