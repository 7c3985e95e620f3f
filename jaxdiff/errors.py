"""The exception for a user's mistakes."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The user's input cannot be used.

    The message is a single line that names the file, row or option and the remedy. The command
    line prints it without a traceback and exits with code 2.
    """


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for a misspelt word, or "" if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
