"""Jobs from Python: rows in, a finished dataset out, as `jaxdiff generate` makes it."""

import contextlib
import datetime
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from apache_beam.utils import interactive_utils

from jaxdiff import checks
from jaxdiff.errors import InputError
from pipelines import generate, generate_options, jobs, runners, supervisor
from pipelines import progress as shown_progress

ROWS = "rows.jsonl"  # the name of a manifest of rows, in messages and records
ROWS_AT_ONCE = 1024  # of a table, as Python objects
INDEX = re.compile(r"__index_level_\d+__")  # the index of a DataFrame, as a column without a name
OF_THE_COMMAND = ("dry_run", "if_missing", "measure", "prompt")  # they have other ways in Python
_running = threading.Lock()  # jobs of one process would share workers and the signal to stop


@dataclass(frozen=True)
class MadeDataset:
    """A finished dataset.

    Attributes:
      directory: its directory, or its address in a bucket.
      made: the number of its images.
      failed: of images that could not be generated; `failed.jsonl` gives the reasons.
      rejected: of rows that could not be used; `rejected.jsonl` gives the reasons.
    """

    directory: str
    made: int
    failed: int
    rejected: int

    @property
    def complete(self) -> bool:
        """Whether every row has its images."""
        return not self.failed and not self.rejected


def make_dataset(
    rows,
    output: str | Path,
    model: str | Path = "shapes64",
    *,
    progress: Callable[[int, int], object] | None = None,
    beam_arguments: Sequence[str] = (),
    **options,
) -> MadeDataset:
    """Makes a dataset as `jaxdiff generate` does, or continues it; equal rows are the same job.

    The images are made by processes of their own, as for the command, which says on stderr and
    stdout what it does. Ctrl-C ends the job after the current batch, if this is the main thread.

    Args:
      rows: a manifest (its path, glob or URL); a pandas DataFrame, a pyarrow Table or another
        table with Arrow's `__arrow_c_stream__`; or any iterable of prompts and of mappings by
        column, such as a `datasets.Dataset`. None and NaN count as missing. Without a manifest,
        paths of images are relative to the working directory.
      output: the dataset's directory, or its address in a bucket.
      model: as for `jaxdiff.load`.
      progress: called with the numbers of finished and of all images, from another thread; in place
        of the progress on stderr.
      beam_arguments: options of Beam, such as "--runner=FlinkRunner".
      **options: those of `jaxdiff generate`, with underscores: `steps=20`, `format="parquet"`.

    Raises:
      InputError: if the rows or an option cannot be used; nothing has been written.
      UnfinishedError, OSError: if the job failed part-way; the same call continues it.
      KeyboardInterrupt: if it was stopped; the same call continues it.
    """
    for name in OF_THE_COMMAND:
        if name in options:
            raise InputError(f"{name} is for the command line; leave it out")
    if not _running.acquire(blocking=False):
        raise InputError("this process is already making a dataset; wait for it")
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(_running.release)
        said, content = {"manifest": rows, "output": output, "model": model, **options}, None
        if not isinstance(rows, str | os.PathLike):
            content = Path(afterwards.enter_context(tempfile.TemporaryDirectory()), ROWS)
            said["manifest"] = ROWS
        job = generate_options.from_python(said)
        if content is not None:
            _write(rows, job.settings.get("prompt_column", "prompt"), content)
            job = replace(job, content=content)
        beam_runner = runners.choose([*beam_arguments], job.workers.count)
        supervisor.device_share(0, job.workers.count, os.environ)
        afterwards.enter_context(_outside_of_notebooks())
        if progress is not None:
            afterwards.enter_context(shown_progress.told_to(progress))
        try:
            counts = generate.make(job, beam_runner)
        except jobs.StoppedError:
            raise KeyboardInterrupt(f"the same call continues {job.output}") from None
    return MadeDataset(job.output, counts["made"], counts["failed"], counts["rejected"])


@contextlib.contextmanager
def _outside_of_notebooks() -> Iterator[None]:
    """Keeps Beam from loading its own tools for notebooks, which need pandas, for one pipeline."""
    known = interactive_utils.is_in_ipython
    interactive_utils.is_in_ipython = lambda: False
    try:
        yield
    finally:
        interactive_utils.is_in_ipython = known


def _write(rows, prompt_column: str, path: Path) -> None:
    """Writes rows as JSON Lines: equal rows give equal bytes with every version of Arrow."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(_rows(rows)):
            values = {prompt_column: row} if isinstance(row, str) else row
            if not isinstance(values, Mapping):
                raise InputError(
                    f"rows[{number}] must be a prompt or a mapping, not {checks.shown(row)}"
                )
            try:
                file.write(json.dumps(_known(values), allow_nan=False, default=_plain) + "\n")
            except (RecursionError, TypeError, ValueError) as problem:
                raise InputError(f"rows[{number}]: {problem}; convert it to text") from None


def _rows(rows) -> Iterable:
    if hasattr(rows, "__arrow_c_stream__"):
        return _arrow_rows(rows)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"rows must be a path, a table or a list, not {checks.shown(rows)}")
    return rows


def _arrow_rows(table) -> Iterator[dict]:
    try:
        for batch in pa.RecordBatchReader.from_stream(table):
            for start in range(0, len(batch), ROWS_AT_ONCE):
                yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()
    except pa.ArrowException as problem:  # such as a column of different types in pandas
        reason = " ".join(" ".join(map(str, problem.args)).split())
        raise InputError(f"rows cannot be read as a table ({reason}); convert the column") from None


def _known(values: Mapping) -> dict:
    """Returns a row's values but for those that pandas adds or has for missing ones."""
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in values.items()
        if not (isinstance(name, str) and INDEX.fullmatch(name))
    }


def _plain(value):
    """Returns a value of a type that JSON does not have as one of its types."""
    if hasattr(value, "tolist"):  # NumPy's
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{checks.shown(value)} is not a value of JSON")
