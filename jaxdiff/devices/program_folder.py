"""The directory that compiled programs are cached in. Imports no JAX."""

import os
from pathlib import Path


def make(directory: Path) -> bool:
    """Makes the directory if it is missing; returns whether it can be used.

    It must be writable for this user, and for no other: they could run code here.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = directory.stat()
    except (OSError, ValueError):  # the latter for a name with a NUL
        return False
    is_own = facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return is_own and os.access(directory, os.W_OK)
