"""The parser of every command's arguments."""

import argparse
import difflib
from collections.abc import Sequence

from jaxdiff.errors import InputError


class Parser(argparse.ArgumentParser):
    """Takes --debug, no abbreviations, and says what is wrong on one line."""

    def __init__(self, command: str, **texts: str):
        super().__init__(
            prog=f"jaxdiff {command}",
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
        """Raises InputError for a needed option, or for its misspelling among the unknown ones."""
        unknown = [word.partition("=")[0] for word in rest]
        for near in difflib.get_close_matches(option, unknown, n=1):
            self.error(f"unknown option {near}; did you mean {option}?")
        self.error(f"{option} is missing{hint}")
