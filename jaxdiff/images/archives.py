"""Finds images in tar archives, such as the shards of a WebDataset. Imports no JAX."""

import functools
import tarfile
from pathlib import Path
from typing import NamedTuple

from jaxdiff.checks import BadValueError, shown

ENDING = ".tar"
MARK = "#"  # between the archive's path and the member's name in an address
MOST_MEMBERS = 2**18
OPEN = 8  # archives whose members are remembered


class Member(NamedTuple):
    """Where the bytes of an archive's file are."""

    offset: int
    size: int


def split(place: str) -> tuple[str, str]:
    """Splits an address into the path of its file and the name of the archive's member, or ""."""
    path, mark, member = place.rpartition(f"{ENDING}{MARK}")
    return (path + ENDING, member) if mark else (place, "")


def members(path: Path) -> dict[str, Member]:
    """Returns the regular files of an archive by name.

    Raises:
      BadValueError: if it is damaged, compressed, or has too many members or two of one name.
    """
    status = path.stat()
    return _members(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=OPEN)
def _members(path: Path, _: int, size: int) -> dict[str, Member]:
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                tar.members.clear()  # they are remembered here
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                if entry.name in found:
                    raise BadValueError(f"{path} has two files {shown(entry.name)}; rename one")
                if entry.offset_data + entry.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                found[entry.name] = Member(entry.offset_data, entry.size)
                if len(found) > MOST_MEMBERS:
                    raise BadValueError(f"{path} has more than {MOST_MEMBERS} files; split it")
    except (tarfile.TarError, EOFError, ValueError) as problem:
        if isinstance(problem, BadValueError):
            raise
        raise BadValueError(f"{path} is not a complete tar archive ({problem})") from None
    return found
