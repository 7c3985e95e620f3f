"""The parser of every command's arguments."""

import argparse

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
