"""The exceptions for a user's mistakes and for jobs that end early."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The user's input cannot be used.

    The message is a single line that names the file, row or option and the remedy. The command
    line prints it without a traceback and exits with code 2.
    """


class UnfinishedError(Exception):
    """A job failed part-way; when the reason in the message is gone, it can be continued."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for a misspelt word, or "" if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
