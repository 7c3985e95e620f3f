"""What all commands share: the parser, and errors as one line and an exit code."""

import argparse
import difflib
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence

from jaxdiff import checks
from jaxdiff.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser with --debug, without abbreviations, that reports errors as InputError."""

    def __init__(self, command: str, description: str, **texts: str):
        if "\n" not in description:
            description = textwrap.fill(description, 100)
        super().__init__(
            prog=f"jaxdiff {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **texts,
        )
        self.add_argument(
            "--debug", action="store_true", help="show tracebacks and the libraries' own messages"
        )

    def error(self, message: str):
        """Raises InputError."""
        raise InputError(f"{message} ({self.prog} --help lists the options)")

    def missing(self, option: str, rest: Sequence[str], hint: str = ""):
        """Raises InputError for a missing option, or for its misspelling among the unknown ones."""
        unknown = [word.partition("=")[0] for word in rest]
        for near in difflib.get_close_matches(option, unknown, n=1):
            self.error(f"unknown option {near}; did you mean {option}?")
        self.error(f"{option} is missing{hint}")


def run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command; returns its exit code. An error is printed as one line on stderr."""
    debug = "--debug" in arguments
    _set_logging(debug)
    try:
        return command(arguments)
    except (Exception, KeyboardInterrupt) as problem:
        if debug:
            traceback.print_exc()
        message, code = _explain(problem)
        print(f"jaxdiff: {checks.printable(message)}", file=sys.stderr)
        return code


def _explain(problem: BaseException) -> tuple[str, int]:
    """Returns a one-line message and the exit code."""
    if isinstance(problem, InputError):
        return str(problem), 2
    if isinstance(problem, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(problem, MemoryError):
        return "there is not enough memory (--debug shows where)", 1
    if isinstance(problem, OSError):
        what = f"{problem.filename}: {problem.strerror or problem}"
        return f"{what}; fix this, then run the same command again", 1
    first, *_ = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {first} (--debug shows where)", 1


def _set_logging(debug: bool) -> None:
    """Sets the log levels; without --debug, silences the libraries' routine messages."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
