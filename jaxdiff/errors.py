"""The one exception that a user's mistake raises."""


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is a single line that names the file, the row or the option, and the mend. The
    command line prints it without a traceback and exits with code 2.
    """
