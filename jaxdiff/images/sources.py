"""The images that a manifest's rows name: their addresses, bytes and pixels. Imports no JAX.

Rows are untrusted: a path is opened only inside the manifest's folder, and only if it is a regular
file of a bounded size.
"""

import os
import posixpath
import re
import stat
from pathlib import Path

import numpy as np

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.errors import InputError
from jaxdiff.images import archives, decoding, tables

MOST_BYTES = 2**27  # per file
TIMEOUT_SECONDS = 30  # for each answer of a remote file system
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.+")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# The schemes that rows may use, and the package that each needs.
PACKAGES = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}


def is_root(said: object) -> bool:
    """Returns whether a plan may name this as its root: a folder, or a URL that rows may use."""
    if not isinstance(said, str) or CONTROL.search(said):
        return False
    url = URL.fullmatch(said)
    return url is None or url[1] in PACKAGES


def address(said: str, root: str) -> str:
    """Returns the address of an image, as the plan and the records name it.

    Args:
      said: what the row says: a URL, or a path.
      root: what paths are relative to: a local folder, or the URL of a remote one.

    Returns:
      The URL unchanged, or a relative POSIX path without "." and "..", such as "cats/1.png". It may
      go on with a file in an archive, "cats.tar#1.png", or a column and row (and the number in a
      list) of a Parquet file, "cats.parquet#image/1", "cats.parquet#control_image/1/0".

    Raises:
      BadValueError: for what is no address, or not one inside `root`, or has a scheme that is not
        in `PACKAGES`.
    """
    said = checks.text("image", said)
    shown = checks.shown(said)
    if not said.strip():
        raise BadValueError("image is empty; name a file")
    if CONTROL.search(said):
        raise BadValueError(f"image {shown} contains a control character; rename the file")
    url = URL.fullmatch(said)
    if url and url[1] not in PACKAGES:
        raise BadValueError(
            f"image {shown} has the scheme {url[1]}://; use one of {', '.join(PACKAGES)}, or a "
            "path relative to the manifest"
        )
    if "::" in said and (url or URL.fullmatch(root)):  # fsspec would open it by way of another
        raise BadValueError(f'image {shown} contains "::"; rename the file')
    return said if url else _relative(said, root)


def _relative(said: str, root: str) -> str:
    path = posixpath.normpath(said)
    if posixpath.isabs(path) and not URL.fullmatch(root):
        for folder in (os.path.abspath(root), os.path.realpath(root)):
            if Path(path).is_relative_to(folder):
                path = str(Path(path).relative_to(folder))
                break
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        raise BadValueError(
            f"image {checks.shown(said)} is not a path inside {root}; move the file there"
        )
    if path == ".":
        raise BadValueError(f"image {checks.shown(said)} is a folder; name a file")
    return path


def read(said: str, root: str) -> bytes:
    """Reads an image file, at most `MOST_BYTES`.

    Args:
      said: from `address`; it is checked again, because a plan may have been edited.
      root: as for `address`.

    Raises:
      BadValueError: naming the image, if it does not exist, cannot be read, is too large, is not
        a regular file, or is a link to a place outside `root`.
    """
    place = address(said, root)
    name = f"image {checks.printable(place)}"
    if tables.split(place)[1] and (URL.fullmatch(place) or URL.fullmatch(root)):
        raise BadValueError(f"{name} is in a Parquet file elsewhere; copy it to this machine")
    if URL.fullmatch(place):
        return _fetched(place, name)
    if URL.fullmatch(root):
        return _fetched(f"{root.rstrip('/')}/{place}", f"{name} in {root}")
    return _read_local(Path(root), place, name)


def _read_local(root: Path, place: str, name: str) -> bytes:
    file_name, member = archives.split(place)
    cell = None
    if not member:
        file_name, cell = tables.split(place)
    try:
        folder = root.resolve(strict=True)
        path = (folder / file_name).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise BadValueError(f"{name} is a link to a place outside {root}; copy the file there")
        # Opening a pipe would wait for a writer, and opening a device may have effects.
        _check_kind(path.stat().st_mode, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            _check_kind(status.st_mode, name)
            size = status.st_size
            if cell:
                image = tables.find(file, cell, name)
                _check_bytes(image.size, name)
                return image.to_pybytes()
            if member:
                found = archives.members(path).get(member)
                if found is None:
                    raise BadValueError(f"{name} is not in the archive; correct the name")
                size = found.size
                file.seek(found.offset)
            _check_bytes(size, name)
            content = file.read(size)
    except (FileNotFoundError, NotADirectoryError):
        raise BadValueError(
            f"{name} does not exist in {root}; add it or correct the path"
        ) from None
    except PermissionError:
        raise BadValueError(f"{name} in {root} may not be read; allow it with `chmod +r`") from None
    except (OSError, RuntimeError) as problem:  # before Python 3.13, circular links are the latter
        reason = getattr(problem, "strerror", None) or "circular links"
        raise BadValueError(f"{name} in {root} cannot be read: {reason}; replace it") from None
    _check_bytes(len(content), name)
    return content


def _check_kind(mode: int, name: str) -> None:
    if stat.S_ISDIR(mode):
        raise BadValueError(f"{name} is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise BadValueError(f"{name} is a pipe or a device; name a regular file")


def _check_bytes(size: int, name: str) -> None:
    if size > MOST_BYTES:
        raise BadValueError(
            f"{name} has more than {MOST_BYTES // 2**20} MiB; make the file smaller"
        )
    if size == 0:
        raise BadValueError(f"{name} is an empty file; replace it")


def _fetched(url: str, name: str) -> bytes:
    """Reads a file through fsspec; for the rest, see `read`."""
    try:
        return _transferred(url, name)
    except BadValueError:
        raise
    except ImportError as problem:
        scheme = url.partition("://")[0]
        remedy = f"pip install {PACKAGES[scheme]}" if scheme in PACKAGES else str(problem)
        raise BadValueError(
            f"{name} cannot be read because a package is missing: {remedy}"
        ) from None
    except FileNotFoundError:
        raise BadValueError(
            f"{name} does not exist or cannot be reached; check the address"
        ) from None
    except PermissionError:
        raise BadValueError(
            f"{name} may not be read with these credentials; grant access to it"
        ) from None
    except TimeoutError:
        raise BadValueError(
            f"{name} did not arrive in {TIMEOUT_SECONDS} seconds; check the network, or copy the "
            "file to the manifest's folder"
        ) from None
    except Exception as problem:  # file systems raise all kinds of exceptions
        reason = " ".join(str(problem).split())
        raise BadValueError(
            f"{name} cannot be read ({type(problem).__name__}: {reason}); check the address"
        ) from problem


def _transferred(url: str, name: str) -> bytes:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    limit = {"timeout": TIMEOUT_SECONDS} if system.async_impl else {}
    entry = system.info(path, **limit)
    if entry["type"] == "directory":
        raise BadValueError(f"{name} is a folder; name a file")
    if entry["size"] is not None:
        _check_bytes(entry["size"], name)
    content = system.cat_file(path, start=0, end=entry["size"] or MOST_BYTES + 1, **limit)
    _check_bytes(len(content), name)
    return content


def opened(content: bytes, name: str) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, 3], upright and composited on white.

    Args:
      content: the file, from `read`.
      name: for messages, such as its address.

    Raises:
      BadValueError: naming the image, if it is animated or cannot be decoded.
    """
    return _still(decoding.decode, content, name)


def mask(content: bytes, name: str) -> np.ndarray:
    """Decodes a mask to uint8 [height, width], upright: white is repainted.

    Colors count by their brightness. Transparent parts are black: not repainted.

    Raises:
      BadValueError: naming the mask, if it is animated or cannot be decoded.
    """
    return _still(decoding.decode_grey, content, name)


def _still(decode, content: bytes, name: str) -> np.ndarray:
    try:
        decoding.check_still(content, name)
        return decode(content, name)
    except InputError as problem:
        raise BadValueError(str(problem)) from problem
