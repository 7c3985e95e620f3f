"""What all jobs share: exit codes, messages, stopping by signals, errors that keep their type."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_OK, EXIT_FAILED, EXIT_SOME_IMAGES_FAILED, EXIT_STOPPED = 0, 1, 3, 75

stopping = threading.Event()  # set by a signal
_failures: list[Exception] | None = None  # of the job in this process; None if there is no job


class StoppedError(Exception):
    """The job was asked to stop."""


def say(message: str) -> None:
    """Prints a line about the job on stderr."""
    print(f"jaxdiff: {message}", file=sys.stderr, flush=True)


def is_debugging() -> bool:
    """Returns whether the command was given `--debug`."""
    return logging.getLogger().isEnabledFor(logging.INFO)


def duration(seconds: float) -> str:
    """Returns a number of seconds in a fitting unit, such as "2.5 h" or "40 s"."""
    if seconds < 1:
        return "less than 1 s"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Returns a number of bytes in a fitting unit, such as "1.5 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def rows(counts: dict[str, int]) -> str:
    """Returns what became of a manifest's rows, by `Plan.rows`."""
    return (
        f"rows: {counts['accepted']} used, {counts['rejected']} rejected, {counts['blank']} blank"
    )


def count(number: int, what: str) -> str:
    """Returns a number with its noun, such as "1 shard" or "2 shards"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Lets the first SIGTERM or Ctrl-C stop the job after its current batch, the second at once."""
    stopping.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, _) -> None:
        os.write(2, b"\njaxdiff: stopping after the current batch\n")  # print may be running
        stopping.set()
        signal.signal(number, old[number])

    for number in old:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def failures_raised() -> Iterator[None]:
    """Runs a Beam job and raises the first error that `failures_kept` kept, with its own type.

    Without this, Beam prints the error and raises a different one that contains it as text.
    """
    global _failures
    _failures = []
    try:
        yield
    finally:
        failures, _failures = _failures, None
    if failures:
        raise failures[0]


@contextlib.contextmanager
def failures_kept() -> Iterator[None]:
    """Runs a DoFn's work and keeps its error for `failures_raised`, if that is in this process.

    On a cluster, the error is raised, and the runner reports it.
    """
    try:
        yield
    except Exception as problem:
        if _failures is None:
            raise
        _failures.append(problem)


def has_failed() -> bool:
    """Returns whether an error has been kept; the rest of the job can then be skipped."""
    return bool(_failures)
