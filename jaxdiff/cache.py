"""The user's cache directory: what takes long to find out, kept by all that it depends on."""

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

KEPT_BYTES = 2**29  # of each kind of answers; the oldest are deleted first


def directory() -> Path:
    """Returns jaxdiff's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdiff"


def private(folder: str) -> Path | None:
    """Returns a folder of the cache directory; None if `make_private` cannot make it."""
    try:
        path = directory() / folder
    except RuntimeError:  # without a home directory
        return None
    return path if make_private(path) else None


def make_private(folder: Path) -> bool:
    """Makes a folder if it is missing; returns whether it can be used.

    It must be writable for this user, and for no other: what they put there could run here.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except (OSError, ValueError):  # the latter for a name with a NUL
        return False
    is_own = facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return is_own and os.access(folder, os.W_OK)


def remembered(kind: str, identity: str, make: Callable[[], bytes]) -> bytes:
    """Returns what `make` returns, if possible from the cache.

    Args:
      kind: the folder.
      identity: everything that the answer depends on, except `code()`.
      make: finds the answer; its exceptions are passed on, and nothing is kept.
    """
    identity = f"{code()} {identity}"
    found = recall(kind, identity)
    if found is None:
        found = make()
        keep(kind, identity, found)
    return found


def recall(kind: str, identity: str) -> bytes | None:
    """Returns what was kept for an identity; None if nothing was, or if it is damaged."""
    folder = private(kind)
    if folder is None:
        return None
    try:
        content = (folder / _name(identity)).read_bytes()
    except OSError:
        return None
    digest, answer = content[:32], content[32:]
    return answer if hashlib.sha256(answer).digest() == digest else None


def keep(kind: str, identity: str, answer: bytes) -> None:
    """Keeps an answer for later processes, or does nothing if the cache cannot be used."""
    folder = private(kind)
    if folder is None:
        return
    scratch = folder / f".{_name(identity)}-{os.getpid()}"
    with contextlib.suppress(OSError):
        scratch.write_bytes(hashlib.sha256(answer).digest() + answer)
        scratch.replace(folder / _name(identity))
    forget_oldest(folder, KEPT_BYTES)


def forget_oldest(folder: Path, most: int) -> None:
    """Deletes the oldest files of a folder until the others have at most so many bytes."""
    with contextlib.suppress(OSError):  # another process may do the same
        newest_first = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)
        sizes = itertools.accumulate(path.stat().st_size for path in newest_first)
        for path, size in zip(newest_first, sizes, strict=True):
            if size > most:
                path.unlink()


@functools.cache
def code() -> str:
    """Returns the SHA-256 (hex) of jaxdiff's own source code."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _name(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()
