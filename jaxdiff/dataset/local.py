"""A dataset in a local directory: atomic writes and a lock for the writer."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.dataset import names, paths
from jaxdiff.dataset.store import Store
from jaxdiff.errors import InputError

# Errors that come again: a name that is too long, a folder that is missing or somebody else's.
UNUSABLE = (
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


@dataclass(frozen=True)
class LocalStore(Store):
    """A store in a directory of a file system with hard links.

    Attributes:
      root: the directory.
    """

    root: Path

    def path(self, name: str) -> Path:
        """Returns the path of the file or folder with this name."""
        return self.root / name

    def scratch(self, name: str) -> Path:
        """Returns a new, unique path for a file or folder."""
        folder = self.path(names.TMP)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def staging(self, attempt: str, name: str) -> Path:
        """Returns the path where an attempt writes the file to publish as `name`."""
        return self.path(names.TMP) / f"{attempt}-{Path(name).parent}{Path(name).suffix}"

    def stage(self, attempt: str, name: str) -> None:
        """Waits until the file at `staging` is on disk."""
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

    def swap(self, name: str, content: str) -> None:
        """Replaces a small file atomically: readers see the old content or the new."""
        path = self.scratch(name)
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(content)
        paths.sync(path)
        os.replace(path, self.path(name))
        paths.sync_names(self.root)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Creates the directory and locks it for this process; leaves no trace without a plan.

        The kernel releases the lock when the process dies. A run that was set aside is settled on
        entry and on exit.

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
        with self.path(names.LOCK).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise InputError(
                    f"{self.root}: {lock.read(200) or 'another job'} is writing here; wait for "
                    "it, or choose another --output"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            try:
                self.settle()
                if not self.path(names.PLAN).exists():
                    self._check_links()
                yield
            finally:
                self.settle()
                if not self.path(names.PLAN).exists():
                    shutil.rmtree(self.path(names.WORK))
                    for path in created:
                        with contextlib.suppress(OSError):
                            path.rmdir()

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
        for path in self.path(names.TMP).glob("*"):
            match = re.search(r"-(.*)-([0-9]+)-[0-9a-f]{8}", path.name)
            if match and match[1] == socket.gethostname() and not _is_alive(int(match[2])):
                paths.delete(path)

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


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process, so not one of ours
        return False
    return True
