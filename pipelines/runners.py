"""Chooses a job's Beam runner and its options from the arguments left for Beam.

A local job always uses the `FnApiRunner`. Beam's default, the `DirectRunner`, downloads another
runner if it can, so the same command would behave differently offline.
"""

import contextlib
import importlib.util
import io
import re
import shutil

from apache_beam.options import pipeline_options as beam_options
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineRunner

from jaxdiff.errors import InputError
from pipelines import spellings
from pipelines.generate_help import OPTIONS

THREADS = 8  # Beam threads per worker; Beam deals the shards out to them in advance, in turn
AT_HOME = ("DirectRunner", "SwitchingDirectRunner", "FnApiRunner")
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"  # Beam does not know its short name
# Runners that need an optional extra: a module to look for, and the extra that installs it.
EXTRAS = {"DaskRunner": ("distributed", "dask"), "DataflowRunner": ("apitools", "gcp")}
# Options that have no effect on a local job, and the runner that uses them.
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
FOR_FILES = ("project", "no_auth", "impersonate_service_account", "gcp_oauth_scopes")  # of gs://


def choose(arguments: list[str], workers: int) -> tuple[PipelineRunner, PipelineOptions]:
    """Reads the arguments that `generate_options.parse` leaves for Beam.

    Args:
      arguments: for example, ["--runner=FlinkRunner", "--flink_master=host:8081"].
      workers: the number of image-making processes for each Beam process.

    Returns:
      The runner, by default the `FnApiRunner`, and its options. A local job has several threads
      per worker, which wait for the worker.

    Raises:
      InputError: if an option or the runner is unknown, unreliable for a job or not installed, or
        if the option belongs to another runner.
    """
    for word in arguments:
        if re.match("-[A-Za-z]", word):  # Beam has no such options, and ignores them
            name, hint = word.partition("=")[0], spellings.suggest(word.partition("=")[0], OPTIONS)
            raise InputError(f"unknown option {name}{hint}")
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
        raise InputError(f"unknown --runner {name}; known runners: {known}") from None
    except (AttributeError, ImportError, TypeError) as problem:
        raise InputError(f"--runner {name}: {problem}") from None
    if not isinstance(runner, PipelineRunner):
        raise InputError(f"--runner {name} is not a Beam runner")
    arguments = [*_defaults(name, arguments, workers), *arguments]
    options = PipelineOptions(arguments)
    _refuse_unknown(options, with_runner=runner)
    if problems := PipelineOptionsValidator(options, runner).validate():
        raise InputError(f"--runner {name}: {'; '.join(problems)}".rstrip("."))
    _need_java(name, options)
    return runner, options


def _runner_name(arguments: list[str]) -> str | None:
    """Returns the runner's name; normalizes special ones, such as `dask`, to Beam's spelling."""
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
            hint = f", or use --{ours.replace('_', '-')}" * (ours in OPTIONS)
            raise InputError(f"--{name} is an option of {owner}: add --runner {owner}{hint}")
    direct = options.view_as(beam_options.DirectOptions)
    if direct.direct_running_mode == "multi_processing":
        raise InputError(
            "--direct_running_mode multi_processing hangs forever when a process dies: "
            "use --workers N instead"
        )
    if workers > 1:
        direct.direct_running_mode, direct.direct_num_workers = "multi_threading", THREADS * workers
    return options


def _defaults(name: str, arguments: list[str], workers: int) -> list[str]:
    """Returns a runner's options that spread shards evenly and load the model once per device."""
    said = {argument.partition("=")[0] for argument in arguments}
    if name == "DaskRunner" and not said & {"--dask_partition_size", "--dask_npartitions"}:
        return ["--dask_partition_size=1"]
    if name == "DataflowRunner":  # by default, one process per core, each with the model
        threads = f"--number_of_worker_harness_threads={workers}"
        return ["--experiments=no_use_multiple_sdk_containers", threads]
    return []


def _refuse_unknown(options: PipelineOptions, with_runner: PipelineRunner | None = None) -> None:
    """Raises InputError for unknown options; a JVM runner may have some, but no misspelled ones."""
    known, every = _parse(options)
    for name in every:
        suggestion = spellings.suggest(name, OPTIONS)
        if name not in known and (suggestion or not isinstance(with_runner, PortableRunner)):
            said = f"--{name.replace('_', '-')}"
            if suggestion.endswith(f"{said}?"):  # correct, but for another command
                raise InputError(f"{said} is an option of jaxdiff generate only")
            raise InputError(f"unknown option {said}{suggestion}")


def _parse(options: PipelineOptions) -> tuple[dict, dict]:
    """Returns the options that Beam knows, and all options, including unknown ones."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return options.get_all_options(), options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        last = (said.getvalue().splitlines() or ["they cannot be read"])[-1]
        raise InputError(f"Beam's options: {last.rpartition('error: ')[2]}") from None


def _need_java(name: str, options: PipelineOptions) -> None:
    """Raises InputError if Beam must start Flink's or Spark's job server and Java is missing."""
    uber_jar = {"FlinkRunner": "flink_submit_uber_jar", "SparkRunner": "spark_submit_uber_jar"}
    said = options.get_all_options()
    if name not in uber_jar or said[uber_jar[name]] or said["job_endpoint"]:
        return
    java = said["job_server_java_launcher"]
    if not shutil.which(java):
        raise InputError(
            f"--runner {name} needs {java} to start its job server: install a Java runtime, "
            f"name a running server with --job_endpoint HOST:PORT, or use --{uber_jar[name]}"
        )
