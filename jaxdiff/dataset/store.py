"""The storage of a dataset: a directory or a bucket, by one protocol."""

import io
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Protocol

from jaxdiff.dataset.local import LocalStore
from jaxdiff.errors import InputError

MISSPELT = re.compile("(s3|gs|az):")  # an address that lacks slashes


class Lock(Protocol):
    """What `Store.held` yields: who may plan, finish or revise a dataset."""

    is_alone: bool
    is_first: bool  # no other process is making shards, for sure

    def try_alone(self) -> bool:
        """Returns whether no other process is there, and keeps it so."""

    def share(self) -> None:
        """Lets other processes make shards, too."""


class Store(Protocol):
    """Storage for a dataset. Names are relative, with "/" between folders: see `names`.

    Files are committed in three steps. A writer writes to a local path (`staging`) and makes the
    file durable (`stage`) under a name that nobody reads yet. Then it claims a name (`claim`): the
    first of several writers wins, and all learn which one did. Finally, the winner's files get
    their final names (`publish`), if they do not have them; anyone may repeat this step.
    """

    renames: ClassVar[bool]  # whether finished files may wait for their final names
    address: str

    def scratch(self, name: str) -> Path:
        """Returns a new, unique local path for a file or folder."""

    def work(self) -> Path:
        """Returns the local folder of unfinished files, which may not exist."""

    def kind(self, name: str, folder: bool = False) -> str | None:
        """Returns why a name is no plain file (or folder), or None if it is."""

    def entries(self, folder: str) -> list[str]:
        """Returns the sorted names of what is in a folder; "" is the top."""

    def read(self, name: str) -> bytes:
        """Returns a small file's bytes; raises ValueError if it is no plain file."""

    def size(self, name: str) -> int:
        """Returns a file's bytes; raises OSError."""

    def etag(self, name: str) -> str | None:
        """Returns what the store calls these bytes of a file; None if it does not know."""

    def digest(self, name: str) -> str:
        """Returns a file's SHA-256 (hex); raises OSError."""

    def open(self, name: str) -> io.BufferedReader:
        """Returns a seekable file; parts that are not asked for are not read."""

    def version(self, name: str) -> str:
        """Returns a text that changes with a file's bytes."""

    def fetched(self, *every: str) -> AbstractContextManager[LocalStore]:
        """Yields a local store with those of the files that exist."""

    def filled(self, *replaced: str) -> AbstractContextManager[Path]:
        """Yields a local folder; what is written there is in the store afterwards.

        Args:
          replaced: names of folders that the caller replaces as a whole.
        """

    def snapshot(self) -> "Store":
        """Returns a store for reading that asks once what is there; a snapshot returns itself."""

    def staging(self, attempt: str, name: str) -> Path:
        """Returns the local path where an attempt writes the file to publish as `name`."""

    def final_name(self, name: str, revision: int, sha256: str) -> str:
        """Returns the name under which a file with this hash is published."""

    def stage(self, attempt: str, name: str, final: str) -> str | None:
        """Makes the file at `staging` durable; returns its `etag`."""

    def claim(self, name: str, content: str) -> str:
        """Creates a small file unless it exists; returns its content, which never changes."""

    def publish(self, attempt: str, name: str) -> None:
        """Gives a staged file its final name; anyone may repeat this after the claim."""

    def withdraw(self, every: Iterable[str]) -> None:
        """Takes back what an attempt staged that was not the first, by its final names."""

    def swap(self, name: str, content: str) -> None:
        """Replaces a small file atomically: readers see the old content or the new."""

    def delete(self, *every: str) -> None:
        """Deletes files; does nothing for those that do not exist."""

    def begin(self, folder: Path, extended: str | None = None) -> None:
        """Puts a plan in its place, from a local folder; `extended` is the one it extends."""

    def prepare(self) -> None:
        """Creates the directory, or checks that the bucket can be used."""

    def held(self, waiting: Callable[[], None] | None = None) -> AbstractContextManager[Lock]:
        """Prepares the store for a job, and checks that it can hold one."""

    def has_shards(self) -> bool:
        """Returns whether the run has a finished shard."""

    def clear(self) -> None:
        """Deletes the run, if there is one, and nothing else."""

    def sweep(self) -> None:
        """Deletes the unfinished files of dead processes on this host."""

    def forget_old(self) -> None:
        """Deletes a run that was set aside, if any."""


def is_address(where: str | Path) -> bool:
    """Returns whether something is an address such as s3://bucket/prefix, not a local path."""
    return "://" in str(where)


def scheme(where: str | Path) -> str | None:
    """Returns "s3", "gs" or "az" for an address, and None for a local path."""
    return str(where).partition("://")[0] if is_address(where) else None


def open_store(where: str | Path) -> Store:
    """Returns the store at an address, or in a directory.

    Raises:
      InputError: if the address is of another kind than s3://, gs:// or az://.
    """
    if not is_address(where):
        if MISSPELT.match(str(where)):
            raise InputError(f"{where} is not the address of a bucket; write it with ://")
        return LocalStore(Path(where))
    from jaxdiff.dataset.bucket import open_bucket  # its client takes a while to load

    return open_bucket(str(where))


def absolute(where: str | Path) -> str:
    """Returns an address, or the absolute path of a directory."""
    return str(where) if is_address(where) else str(Path(where).absolute())


def join(where: str | Path, name: str) -> str | Path:
    """Returns the address, or the path, of what has a name in a bucket or in a directory."""
    return f"{str(where).rstrip('/')}/{name}" if is_address(where) else Path(where) / name


def local(where: str | Path, what: str) -> LocalStore:
    """Returns the store in a directory; raises InputError for an address.

    Args:
      what: cannot be done in a bucket, such as "--repair".
    """
    if is_address(where):
        raise InputError(f"{where}: {what} needs a local directory; copy the dataset to a disk")
    return LocalStore(Path(where))
