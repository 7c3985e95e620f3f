"""Completion of the command line by a shell.

The shell runs `jaxdiff` with the line so far in COMP_LINE, and argcomplete answers it:

    eval "$(register-python-argcomplete jaxdiff)"
"""

import argparse
import os
from collections.abc import Collection

ASKED = "_ARGCOMPLETE"  # the variable says with which word of the line the arguments begin


def is_asked() -> bool:
    """Returns whether a shell runs this process to complete a line."""
    return ASKED in os.environ


def command(names: Collection[str]) -> str:
    """Returns the command that the line names, whose parser is to complete the rest.

    If its name is not complete, this answers the shell and ends the process.
    """
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line[-1].isspace()):
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("command", choices=names)
        answer(parser)
    os.environ[ASKED] = "2"
    return words[1]


def answer(parser: argparse.ArgumentParser) -> None:
    """Answers the shell with what the parser would take next, and ends the process."""
    import argcomplete

    argcomplete.autocomplete(parser)
