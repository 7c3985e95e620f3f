"""A dataset in a local directory: atomic writes, and a lock for its writers."""

import contextlib
import errno
import io
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxdiff.dataset import names, paths
from jaxdiff.dataset.lock import Lock
from jaxdiff.errors import InputError

# Errors that come again: a name that is too long, a folder that is missing or somebody else's.
POLL_SECONDS = 0.2
UNUSABLE = (
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


@dataclass(frozen=True)
class LocalStore:
    """A store in a directory of a file system with hard links.

    Attributes:
      renames: whether finished files may wait for their final names.
      root: the directory.
    """

    renames: ClassVar[bool] = True

    root: Path

    @property
    def address(self) -> str:
        """The directory, as text."""
        return str(self.root)

    def path(self, name: str) -> Path:
        """Returns the path of the file or folder with this name."""
        return self.root / name

    def scratch(self, name: str) -> Path:
        """Returns a new, unique path for a file or folder."""
        self.work().mkdir(parents=True, exist_ok=True)
        return self.work() / f"{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def work(self) -> Path:
        """Returns the folder of unfinished files, which may not exist."""
        return self.path(names.TMP)

    # What is there.

    def kind(self, name: str, folder: bool = False) -> str | None:
        """Returns why a name is no plain file (or folder), or None if it is; follows no link."""
        return paths.wrong_kind(self.path(name), folder)

    def entries(self, folder: str) -> list[str]:
        """Returns the sorted names of what is in a folder; "" is the top."""
        is_there = not folder or not self.kind(folder, folder=True)
        return sorted(os.listdir(self.path(folder))) if is_there else []

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises ValueError if it is no plain file."""
        return paths.read(self.path(name))

    def size(self, name: str) -> int:
        """Returns the bytes of a file or folder; raises OSError if it cannot be read."""
        return paths.size(self.path(name))

    def etag(self, name: str) -> str | None:
        """Returns None: a disk does not say what a file holds."""

    def digest(self, name: str) -> str:
        """Returns the SHA-256 (hex) as `paths.digest` does; raises OSError."""
        return paths.digest(self.path(name))

    def open(self, name: str) -> io.BufferedReader:
        """Opens a file for reading."""
        return self.path(name).open("rb")

    def version(self, name: str) -> str:
        """Returns a text that changes with a file's bytes."""
        return str(self.path(name).stat().st_mtime_ns)

    @contextlib.contextmanager
    def fetched(self, *every: str) -> Iterator["LocalStore"]:
        """Yields a local store that has the files: this one."""
        yield self

    @contextlib.contextmanager
    def filled(self, *replaced: str) -> Iterator[Path]:
        """Yields the directory itself; the caller replaces the folders."""
        yield self.root

    def snapshot(self) -> "LocalStore":
        """Returns a store that knows what is there now: this one, which asks the disk."""
        return self

    # Writing.

    def staging(self, attempt: str, name: str) -> Path:
        """Returns the path where an attempt writes the file to publish as `name`."""
        return self.path(names.TMP) / f"{attempt}-{Path(name).parent}{Path(name).suffix}"

    def final_name(self, name: str, revision: int, sha256: str) -> str:
        """Returns the name itself: of all attempts, only the first publishes its files."""
        return name

    def stage(self, attempt: str, name: str, final: str) -> None:
        """Waits until the file at `staging` is on disk; a disk has no etag to return."""
        paths.sync(self.staging(attempt, name))

    def claim(self, name: str, content: str) -> str:
        """Creates a small file unless it exists; returns its content, which never changes.

        Linking is atomic and fails if the name exists.
        """
        body, final = self.scratch("claim"), self.path(name)
        final.parent.mkdir(exist_ok=True)
        try:
            body.write_text(content, "utf-8")
            paths.sync(body)
            with contextlib.suppress(FileExistsError):
                os.link(body, final)
            paths.sync_names(final.parent)
        finally:
            body.unlink(missing_ok=True)
        return final.read_text("utf-8", "backslashreplace")  # it may have been damaged

    def publish(self, attempt: str, name: str) -> None:
        """Gives a staged file its final name; may be repeated."""
        final = self.path(name)
        final.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it has its name already
            paths.replace(self.staging(attempt, name), final)
            paths.sync_names(final.parent)

    def withdraw(self, every: Iterable[str]) -> None:
        """Does nothing: the files of an attempt that was not the first have no final names."""

    def swap(self, name: str, content: str) -> None:
        """Replaces a small file atomically: readers see the old content or the new."""
        path = self.scratch(name)
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(content)
        paths.sync(path)
        os.replace(path, self.path(name))
        paths.sync_names(self.root)

    def delete(self, *every: str) -> None:
        """Deletes files; does nothing for those that do not exist."""
        for name in every:
            self.path(name).unlink(missing_ok=True)

    def begin(self, folder: Path, extended: str | None = None) -> None:
        """Moves a plan from a folder into the dataset; a kill leaves the old plan or the new.

        Args:
          extended: the id of the plan that it extends; else another run is set aside.
        """
        if extended is None:
            self.set_aside()
        for path in folder.iterdir():
            paths.sync(path)
        target = self.path(names.PLAN)
        if not target.exists():
            os.rename(folder, target)
            paths.sync_names(self.path(names.WORK))
            return
        self.delete(names.SUCCESS, names.REPORT)  # they belong to the old plan
        for path in sorted(folder.iterdir(), key=lambda path: path.name == names.PLAN_JSON):
            os.replace(path, target / path.name)  # plan.json last
            paths.sync_names(target)

    # The job.

    def prepare(self) -> None:
        """Creates the directory; raises OSError if it cannot be created."""
        self.root.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def held(self, waiting: Callable[[], None] | None = None) -> Iterator[Lock]:
        """Creates the directory and yields its lock; leaves no trace without a plan.

        A run that was set aside is settled on entry and on exit.

        Args:
          waiting: if given, the lock may be shared with processes that have a plan already. It is
            called while waiting for one, and may raise.

        Raises:
          InputError: if the directory contains other files, one of its folders is a link, or
            another process has locked it, or it cannot be created.
        """
        try:
            self._check_ours()
            created = [path for path in (self.root, *self.root.parents) if not path.exists()]
            self.path(names.WORK).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            if problem.errno not in UNUSABLE:  # a disk may be full, a server away for a while
                raise
            raise InputError(
                f"--output {self.root} cannot be used ({problem.strerror}); name another directory"
            ) from None
        lock = Lock(self.path(names.LOCK))
        try:
            self._take(lock, waiting)
            if lock.is_alone:
                self.settle()
                if not self.path(names.PLAN).exists():
                    self._check_links()
            yield lock
        finally:
            if lock.try_alone():
                self.settle()
                if self.path(names.SUCCESS).exists():
                    # A lost process on another host may still be writing there.
                    shutil.rmtree(self.path(names.TMP), ignore_errors=True)
                if not self.path(names.PLAN).exists():
                    shutil.rmtree(self.path(names.WORK))
                    for path in created:
                        with contextlib.suppress(OSError):
                            path.rmdir()
            lock.release()

    def _take(self, lock: Lock, waiting: Callable[[], None] | None) -> None:
        """Takes the lock alone, or with others that have a plan if `waiting` is given."""
        while not lock.try_alone():
            if waiting is None:
                raise InputError(
                    f"{self.root}: {lock.holder() or 'another job'} is writing here; wait for "
                    "it, or choose another --output"
                )
            if lock.try_shared() and self.path(names.PLAN).is_dir():
                return
            waiting()
            time.sleep(POLL_SECONDS)

    def _check_links(self) -> None:
        """Rejects a file system without hard links, which `claim` needs."""
        probe = self.scratch("probe")
        try:
            os.link(self.path(names.LOCK), probe)
            probe.unlink()
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"--output {self.root} is on a file system without hard links "
                f"({problem.strerror}), which mark finished shards; mounted buckets have none"
            ) from None

    def _check_ours(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--output {self.root} is a file; name a directory")
        for path in map(self.path, (*names.FOLDERS, names.LOCK)):
            if path.is_symlink():
                raise InputError(
                    f"{path} is a link, and a job writes only inside its directory; replace the "
                    "link by what it points to"
                )
        has_run = self.path(names.PLAN).is_dir() or self._old(names.PLAN).is_dir()
        ours = has_run or not self.root.exists()
        if not ours and any(path.name != names.WORK for path in self.root.iterdir()):
            raise InputError(
                f"--output {self.root} holds other files and no jaxdiff run; name a new directory"
            )

    def has_shards(self) -> bool:
        """Returns whether the run has a finished shard."""
        return any(self.path(names.DONE).glob("*.json"))

    def sweep(self) -> None:
        """Deletes the unfinished files of dead processes on this host.

        Call `shard.publish` for every finished shard first: its files may still have temporary
        names.
        """
        delete_lost(self.path(names.TMP))

    def tidy(self) -> None:
        """Removes the folder of unfinished files, and the directory, where they are empty."""
        for folder in (self.path(names.TMP), self.path(names.WORK), self.root):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def clear(self) -> None:
        """Deletes the run in the directory, if there is one, and nothing else."""
        if not self.path(names.PLAN).is_dir():
            return
        *others, plan = names.OURS
        for name in others:
            paths.delete(self.path(name))
        gone = self.scratch("plan")
        os.rename(self.path(plan), gone)  # atomically: part of a plan could pass for a plan
        paths.delete(gone)

    def set_aside(self) -> None:
        """Moves the run to `names.OLD`, until `settle` or `forget_old`."""
        if self.path(names.PLAN).is_dir():
            self.path(names.OLD).mkdir()
            for name in reversed(names.OURS):  # the plan first: it marks the run as moved
                if os.path.lexists(self.path(name)):
                    os.rename(self.path(name), self._old(name))

    def settle(self) -> None:
        """Restores a run that was set aside, unless the new one has a finished shard.

        The decision depends on the files alone, so this may be repeated after a kill at any time.
        """
        if not self.path(names.OLD).is_dir():
            return
        if self.path(names.PLAN).is_dir():
            if self.has_shards() or not self._old(names.PLAN).is_dir():
                self.forget_old()  # or the rest of its folder: the plan is the old one
                return
            self.path(names.DEVICE).unlink(missing_ok=True)
            shutil.rmtree(self.path(names.BATCH), ignore_errors=True)
            shutil.rmtree(self.path(names.PLAN))
        for name in names.OURS:  # the plan last; the new run has empty folders at most
            if os.path.lexists(self._old(name)):
                os.replace(self._old(name), self.path(name))
        self.path(names.OLD).rmdir()

    def forget_old(self) -> None:
        """Deletes the run that was set aside, if any; processes may do so concurrently."""
        shutil.rmtree(self.path(names.OLD), ignore_errors=True)

    def _old(self, name: str) -> Path:
        return self.path(names.OLD) / Path(name).name


def delete_lost(folder: Path) -> None:
    """Deletes what dead processes on this host left in a folder for `scratch`."""
    for path in folder.glob("*"):
        match = re.search(r"-(.*)-([0-9]+)-[0-9a-f]{8}", path.name)
        if match and match[1] == socket.gethostname() and not _is_alive(int(match[2])):
            paths.delete(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process, so not one of ours
        return False
    return True
