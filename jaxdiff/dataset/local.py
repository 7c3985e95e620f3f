"""A dataset in a directory of a local disk: how a file appears whole, and who may write."""

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

from jaxdiff.dataset import files, names
from jaxdiff.errors import InputError


@dataclass(frozen=True)
class LocalStore:
    """`store.Store` in a directory of a file system with hard links.

    Attributes:
      root: the directory.
    """

    root: Path

    def path(self, name: str) -> Path:
        """Where the file or folder of this name lies."""
        return self.root / name

    def scratch(self, name: str) -> Path:
        """A new path for a file or folder; nobody else gets the same."""
        folder = self.path(names.TMP)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def staging(self, attempt: str, name: str) -> Path:
        """The path to which an attempt writes what is to be published as `name`."""
        return self.path(names.TMP) / f"{attempt}-{Path(name).parent}{Path(name).suffix}"

    def stage(self, attempt: str, name: str) -> None:
        """Waits until what was written to `staging` is on the disk."""
        files.sync(self.staging(attempt, name))

    def claim(self, name: str, content: str) -> str:
        """Creates a small file unless it is there; returns its content, which never changes.

        A link is atomic and fails where there is one already.
        """
        body, final = self.scratch("claim"), self.path(name)
        final.parent.mkdir(exist_ok=True)
        try:
            body.write_text(content, "utf-8")
            files.sync(body)
            with contextlib.suppress(FileExistsError):
                os.link(body, final)
            files.sync_names(final.parent)
        finally:
            body.unlink(missing_ok=True)
        return final.read_text("utf-8")

    def publish(self, attempt: str, name: str) -> None:
        """Gives what was staged its name; may be repeated."""
        final = self.path(name)
        final.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it has its name already
            files.replace(self.staging(attempt, name), final)
            files.sync_names(final.parent)

    def swap(self, name: str, content: str) -> None:
        """Replaces a small file: its readers see the old content or the new one."""
        path = self.scratch(name)
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(content)
        files.sync(path)
        os.replace(path, self.path(name))
        files.sync_names(self.root)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory and holds it for this process; while unplanned, leaves no trace.

        The lock is the kernel's, so that a process that dies gives it back. A run that was set
        aside is settled at the beginning and at the end.

        Raises:
          InputError: if the directory holds other files, or another process holds it.
        """
        self._check_ours()
        created = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.path(names.WORK).mkdir(parents=True, exist_ok=True)
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
        """Rejects a file system on which nothing could be claimed."""
        probe = self.scratch("probe")
        try:
            os.link(self.path(names.LOCK), probe)
            probe.unlink()
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"--output {self.root} is on a file system without hard links "
                f"({problem.strerror}), which mark a shard as made; mounted buckets have none"
            ) from None

    def _check_ours(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--output {self.root} is a file; name a directory")
        has_run = self.path(names.PLAN).is_dir() or self._old(names.PLAN).is_dir()
        ours = has_run or not self.root.exists()
        if not ours and any(path.name != names.WORK for path in self.root.iterdir()):
            raise InputError(
                f"--output {self.root} holds other files and no jaxdiff run; name a new directory"
            )

    def has_shards(self) -> bool:
        """Whether a shard of the run is made."""
        return any(self.path(names.DONE).glob("*.json"))

    def sweep(self) -> None:
        """Deletes what dead processes of this host have left unfinished.

        Call `shard.publish` for all that is made first: its files may still have temporary names.
        """
        for path in self.path(names.TMP).glob("*"):
            match = re.search(r"-(.*)-([0-9]+)-[0-9a-f]{8}", path.name)
            if match and match[1] == socket.gethostname() and not _is_alive(int(match[2])):
                files.delete(path)

    def tidy(self) -> None:
        """Removes the folder of unfinished files, and the directory if that was all in it."""
        for folder in (self.path(names.TMP), self.path(names.WORK), self.root):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def clear(self) -> None:
        """Deletes the run that is there, if there is one, and nothing else."""
        if not self.path(names.PLAN).is_dir():
            return
        *others, plan = names.OURS
        for name in others:
            files.delete(self.path(name))
        gone = self.scratch("plan")
        os.rename(self.path(plan), gone)  # at once: a part of a plan might be taken for one
        files.delete(gone)

    def set_aside(self) -> None:
        """Keeps the run that is there in `names.OLD`, until `settle` or `forget_old`."""
        if self.path(names.PLAN).is_dir():
            self.path(names.OLD).mkdir()
            for name in reversed(names.OURS):  # the plan first: it stands for what was moved
                if os.path.lexists(self.path(name)):
                    os.rename(self.path(name), self._old(name))

    def settle(self) -> None:
        """Puts a run that was set aside back, unless the new one has made a shard.

        It decides by the files alone and may be repeated, after a kill at any moment too.
        """
        if not self.path(names.OLD).is_dir():
            return
        if self.path(names.PLAN).is_dir():
            if self.has_shards() or not self._old(names.PLAN).is_dir():
                self.forget_old()  # or what is left of its folder: the plan is the old one
                return
            self.path(names.DEVICE).unlink(missing_ok=True)
            shutil.rmtree(self.path(names.BATCH), ignore_errors=True)
            shutil.rmtree(self.path(names.PLAN))
        for name in names.OURS:  # the plan last; of the new run there are at most empty folders
            if os.path.lexists(self._old(name)):
                os.replace(self._old(name), self.path(name))
        self.path(names.OLD).rmdir()

    def forget_old(self) -> None:
        """Deletes the run that was set aside, if there is one; processes may do so at once."""
        shutil.rmtree(self.path(names.OLD), ignore_errors=True)

    def _old(self, name: str) -> Path:
        return self.path(names.OLD) / Path(name).name


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, so it is not of a run of ours
        return False
    return True
