"""A lock on a directory: one process holds it alone, or several share it. Buckets need none."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO


class Lock:
    """A lock by `flock`, which the kernel releases when the process dies.

    Args:
      path: the lock's file. Its folder may be deleted and made again by whoever holds it alone.
    """

    def __init__(self, path: Path):
        self.is_alone = False
        self._path = path
        self._file: TextIO | None = None

    @property
    def is_first(self) -> bool:
        """Whether no other process is making shards."""
        return self.is_alone

    def try_alone(self) -> bool:
        """Takes the lock alone if no other process has it; else a shared one is lost for good."""
        if not self.is_alone:
            self.is_alone = self._try(fcntl.LOCK_EX)
            if self.is_alone:
                self._file.truncate(0)
                self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
                self._file.flush()
        return self.is_alone

    def try_shared(self) -> bool:
        """Takes the lock with others, unless a process has it alone."""
        return self._try(fcntl.LOCK_SH)

    def share(self) -> None:
        """Lets other processes take the lock, too."""
        fcntl.flock(self._file, fcntl.LOCK_SH)
        self.is_alone = False

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._file:
            self._file.close()
        self._file, self.is_alone = None, False

    def holder(self) -> str:
        """Returns which process took the lock alone last, if that is known."""
        try:
            return self._path.read_text("utf-8", "replace")[:200]
        except OSError:
            return ""

    def _try(self, kind: int) -> bool:
        self.release()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return True
        except (BlockingIOError, FileNotFoundError):  # held, or deleted since it was opened
            pass
        self.release()
        return False


class Unlocked:
    """Stands for a lock where none is needed: conditional writes decide which process was first."""

    is_alone = True  # may plan and finish
    is_first = False  # is not known

    def try_alone(self) -> bool:
        """Returns False: whether other processes are there is not known."""
        return False

    def share(self) -> None:
        """Does nothing."""
