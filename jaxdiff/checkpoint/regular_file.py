"""Opens the files of a checkpoint."""

import stat
from pathlib import Path
from typing import BinaryIO

from jaxdiff.errors import InputError


def opened(path: Path) -> BinaryIO:
    """Opens a regular file for reading.

    A named pipe in its place would block for ever, and a device might never end.

    Raises:
      InputError: if it is not a regular file.
      OSError: if it cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} is not a regular file; copy the checkpoint again")
    return path.open("rb")
