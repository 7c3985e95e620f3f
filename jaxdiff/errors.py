"""The one exception that a user's mistake raises."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is a single line that names the file, the row or the option, and the mend. The
    command line prints it without a traceback and exits with code 2.
    """


def suggestion(word: str, known: Iterable[str]) -> str:
    """What a misspelt word may have meant, as the end of a message; "" if nothing comes near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
