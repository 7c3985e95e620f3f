"""Operations on a file or a folder alike: an imagefolder shard is a folder."""

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path


def wrong_kind(path: Path, folder: bool = False) -> str | None:
    """Returns why a path is no plain file (or folder), or None if it is; follows no link."""
    try:
        mode = path.lstat().st_mode
    except OSError as problem:
        if problem.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return "is missing"  # or its folder is: a file, or a link to itself, holds nothing
    if stat.S_ISLNK(mode):
        return "is a link"
    if folder:
        return None if stat.S_ISDIR(mode) else "is not a folder"
    return None if stat.S_ISREG(mode) else "is not a file"


def wrong_kind_within(path: Path, folder: bool) -> str | None:
    """Like `wrong_kind`; a folder may hold plain files only."""
    if (why := wrong_kind(path, folder)) or not folder:
        return why
    found = ((entry.name, wrong_kind(entry)) for entry in sorted(path.iterdir()))
    return next((f"holds {name}, which {why}" for name, why in found if why), None)


def read(path: Path) -> bytes:
    """Returns a file's content; raises ValueError if the path is no plain file."""
    if why := wrong_kind(path):
        raise ValueError(f"{path.name} {why}")
    return path.read_bytes()


def digest(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file, or of a folder's sorted lines "SHA-256  name".

    Raises:
      OSError: if it cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = sorted(os.fsencode(f"{digest(entry)}  {entry.name}\n") for entry in path.iterdir())
    return hashlib.sha256(b"".join(lines)).hexdigest()


def size(path: Path) -> int:
    """Returns the bytes of a file or of all files in a folder; raises OSError if unreadable."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(size(entry) for entry in path.iterdir())


def delete(path: Path) -> None:
    """Deletes a file or a folder with its contents; does nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Like `os.replace`, but also replaces folders.

    Raises:
      FileNotFoundError: if the source does not exist; nothing is changed then.
      OSError: names the target, which may be a file where a folder is expected, or vice versa.
    """
    try:
        os.replace(source, target)
    except OSError as problem:
        if problem.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise OSError(problem.errno, problem.strerror, str(target)) from None
        old = source.with_name(f"{source.name}.old")
        os.rename(target, old)
        os.rename(source, target)
        delete(old)


def sync(path: Path) -> None:
    """Flushes a file, or a folder with its files and their names, to survive a power cut."""
    if not path.is_dir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return
    for entry in path.iterdir():
        sync(entry)
    sync_names(path)


def sync_names(folder: Path) -> None:
    """Flushes the names in a folder to survive a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # unsupported by some network file systems
            raise
    finally:
        os.close(file)
