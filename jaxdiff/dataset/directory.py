"""The output directory: what lies where in it, who may write to it, how a file appears whole."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from jaxdiff.errors import InputError

WORK = "_jaxdiff"
PLAN = f"{WORK}/plan"
DONE = f"{WORK}/done"
TMP = f"{WORK}/tmp"
LOCK = f"{WORK}/lock"
DATA = "data"
METADATA = "metadata"
SUCCESS = "_SUCCESS"
REJECTED = "rejected.jsonl"
FAILED = "failed.jsonl"
RUN = "run.json"
CARD = "README.md"
CROISSANT = "croissant.json"
# All that a run leaves, in the order in which it is deleted: what has lost a file must not look
# finished, and while the plan is there the directory is known as ours.
OURS = (SUCCESS, DONE, DATA, METADATA, CARD, CROISSANT, RUN, REJECTED, FAILED, PLAN)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory and holds it for this process; while it is unplanned, leaves no trace.

    The lock is the kernel's, so that a process that dies gives it back.

    Raises:
      InputError: if the directory holds other files, or another process holds it.
    """
    _check_ours(directory)
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    (directory / WORK).mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InputError(
                f"{directory}: {lock.read(200) or 'another job'} is writing here; wait for it, or "
                "choose another --output"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            if not (directory / PLAN).exists():
                shutil.rmtree(directory / WORK)
                for path in created:
                    with contextlib.suppress(OSError):
                        path.rmdir()


def _check_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output {directory} is a file; name a directory")
    ours = (directory / PLAN).is_dir() or not directory.exists()
    if not ours and any(path.name != WORK for path in directory.iterdir()):
        raise InputError(
            f"--output {directory} holds other files and no jaxdiff run; name a new directory"
        )


def clear(directory: Path) -> None:
    """Deletes the run that is there, if there is one, and nothing else."""
    if not (directory / PLAN).is_dir():
        return
    for name in OURS:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def temporary(directory: Path, name: str) -> Path:
    """A path for a file or folder that is not finished; nobody else gets the same."""
    folder = directory / TMP
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def write(directory: Path, name: str, content: str) -> None:
    """Writes a small file of the directory: its readers see the old content or the new one."""
    path = temporary(directory, name)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, directory / name)
    sync_folder(directory)


def sync_folder(folder: Path) -> None:
    """Waits until the folder's names would survive a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as problem:
        if problem.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(file)
