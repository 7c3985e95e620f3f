"""SHA-256 of files, cached between runs. Imports no JAX."""

import hashlib
import time
from pathlib import Path

from jaxdiff import cache

REMEMBERED_BYTES = 50_000_000  # smaller files are hashed too fast to be worth caching
SETTLED_SECONDS = 5  # a file that changed this recently may change again without a new time stamp


def fingerprint(files: dict[str, Path]) -> str:
    """Returns the SHA-256 (hex) of the contents and names of files, wherever they are stored.

    Args:
      files: the path of each file, by the name to hash, for example "unet/config.json".
    """
    digest = hashlib.sha256()
    for name, path in sorted(files.items(), key=lambda item: Path(item[0])):
        digest.update(f"{file_sha256(path)}  {name}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file.

    The hash of a large file is cached in the user's cache directory, and reused if the file's path,
    size and times are the same. These include the last change of its inode, which no program can
    set, so new contents with an old time stamp are noticed.
    """
    status = path.stat()
    if status.st_size < REMEMBERED_BYTES:
        return _sha256(path)
    identity = (
        *(path.resolve(), status.st_dev, status.st_ino),
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
    )
    kept = cache.recall("sha256", repr(identity))
    if kept is not None:
        return kept.decode()
    content = _sha256(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
        cache.keep("sha256", repr(identity), content.encode())
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
