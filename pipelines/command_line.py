"""What all commands share: the parser, and errors as one line and an exit code."""

import argparse
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence

from jaxdiff import checks
from jaxdiff.errors import InputError
from pipelines import completion, spellings


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

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """Reads the known arguments, or completes them if a shell asks."""
        if completion.is_asked() and type(self) is Parser:  # argcomplete parses as a subclass
            completion.answer(self)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Reads the arguments, all of which must be known; raises InputError."""
        said, rest = self.parse_known_args(args, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            if not name.startswith("-"):
                self.error(f"unexpected {rest[0]!r}")
            self.error(f"unknown option {name}{spellings.suggest(name, self.names)}")
        return said

    @property
    def names(self) -> list[str]:
        """The names of the options, with underscores."""
        flags = (flag for action in self._actions for flag in action.option_strings)
        return [flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")]

    def error(self, message: str):
        """Raises InputError."""
        raise InputError(f"{message} ({self.prog} --help lists the options)")

    def missing(self, option: str, rest: Sequence[str], hint: str = "", others: Sequence[str] = ()):
        """Raises InputError for a missing option, or for a misspelling among the unknown ones.

        Args:
          option: its name, with hyphens.
          rest: the unknown arguments.
          hint: the end of the message.
          others: names of options in its place, without hyphens.
        """
        names = [option[2:].replace("-", "_"), *others]
        for word in (word.partition("=")[0] for word in rest if word.startswith("-")):
            if spellings.closest(word, names):
                self.error(f"unknown option {word}{spellings.suggest(word, names)}")
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
