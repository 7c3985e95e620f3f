"""The output directory: what lies where in it, who may write to it, how a file appears whole."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
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
DEVICE = f"{WORK}/device"  # the kind that makes the run's images
BATCH = f"{WORK}/batch"  # for each bucket, how many images an accelerator takes at once
OLD = f"{WORK}/old"  # the run that --overwrite replaces, until the new one has made a shard
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
OURS = (SUCCESS, DONE, DEVICE, BATCH, DATA, METADATA, CARD, CROISSANT, RUN, REJECTED, FAILED, PLAN)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory and holds it for this process; while it is unplanned, leaves no trace.

    The lock is the kernel's, so that a process that dies gives it back. A run that was set aside is
    settled at the beginning and at the end.

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
            settle(directory)
            if not (directory / PLAN).exists():
                _check_links(directory)
            yield
        finally:
            settle(directory)
            if not (directory / PLAN).exists():
                shutil.rmtree(directory / WORK)
                for path in created:
                    with contextlib.suppress(OSError):
                        path.rmdir()


def _check_links(directory: Path) -> None:
    """Refuses a file system on which no shard could be committed."""
    probe = temporary(directory, "probe")
    try:
        os.link(directory / LOCK, probe)
        probe.unlink()
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"--output {directory} is on a file system without hard links ({problem.strerror}), "
            "which mark a shard as made; mounted buckets have none"
        ) from None


def _check_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output {directory} is a file; name a directory")
    has_run = (directory / PLAN).is_dir() or (directory / OLD / Path(PLAN).name).is_dir()
    ours = has_run or not directory.exists()
    if not ours and any(path.name != WORK for path in directory.iterdir()):
        raise InputError(
            f"--output {directory} holds other files and no jaxdiff run; name a new directory"
        )


def clear(directory: Path) -> None:
    """Deletes the run that is there, if there is one, and nothing else."""
    if not (directory / PLAN).is_dir():
        return
    *names, plan = OURS
    for name in names:
        delete(directory / name)
    gone = temporary(directory, "plan")
    os.rename(directory / plan, gone)  # at once: what is left of a plan might be taken for one
    delete(gone)


def set_aside(directory: Path) -> None:
    """Keeps the run that is there in `OLD`, until `settle` or `forget_old`."""
    if (directory / PLAN).is_dir():
        (directory / OLD).mkdir()
        for name in reversed(OURS):  # the plan first: while it lies there, nothing has been moved
            if os.path.lexists(directory / name):
                os.rename(directory / name, _old(directory, name))


def settle(directory: Path) -> None:
    """Puts a run that was set aside back, unless the new one has made a shard.

    It decides by the files alone and may be repeated, after a kill at any moment too.
    """
    if not (directory / OLD).is_dir():
        return
    if (directory / PLAN).is_dir():
        if has_shards(directory) or not _old(directory, PLAN).is_dir():
            forget_old(directory)  # or what is left of its folder: the plan is the old one
            return
        (directory / DEVICE).unlink(missing_ok=True)
        shutil.rmtree(directory / BATCH, ignore_errors=True)
        shutil.rmtree(directory / PLAN)
    for name in OURS:  # the plan last; of the new run there are at most empty folders
        if os.path.lexists(_old(directory, name)):
            os.replace(_old(directory, name), directory / name)
    (directory / OLD).rmdir()


def forget_old(directory: Path) -> None:
    """Deletes the run that was set aside, if there is one; processes may do so at once."""
    shutil.rmtree(directory / OLD, ignore_errors=True)


def has_shards(directory: Path) -> bool:
    """Whether a shard of the run is made."""
    return any((directory / DONE).glob("*.json"))


def _old(directory: Path, name: str) -> Path:
    return directory / OLD / Path(name).name


def sweep(directory: Path) -> None:
    """Deletes what dead processes of this host have left unfinished.

    Call `shard.publish` for all that is made first: its files may still have temporary names.
    """
    for path in (directory / TMP).glob("*"):
        match = re.search(r"-(.*)-([0-9]+)-[0-9a-f]{8}", path.name)
        if match and match[1] == socket.gethostname() and not _is_alive(int(match[2])):
            delete(path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so it is none of a run of ours
        return False
    return True


def temporary(directory: Path, name: str) -> Path:
    """A path for a file or folder that is not finished; nobody else gets the same."""
    folder = directory / TMP
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def pin(directory: Path, name: str, content: str) -> str:
    """Writes a small file unless it is there; returns what it says, which never changes."""
    path = temporary(directory, "pin")
    path.write_text(content, "utf-8")
    (directory / name).parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.link(path, directory / name)
    path.unlink()
    return (directory / name).read_text("utf-8")


def write(directory: Path, name: str, content: str) -> None:
    """Writes a small file of the directory: its readers see the old content or the new one."""
    path = temporary(directory, name)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, directory / name)
    sync_folder(directory)


def tidy(directory: Path) -> None:
    """Removes the folder of unfinished files, and the directory if that was all in it."""
    for folder in (directory / TMP, directory / WORK, directory):
        with contextlib.suppress(OSError):
            folder.rmdir()


def replace(source: Path, target: Path) -> None:
    """`os.replace`, for a shard that is a folder as well.

    Raises:
      FileNotFoundError: if there is no source; then nothing has happened.
      OSError: naming the target, which somebody's file or folder of another kind may occupy.
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


def digest(path: Path) -> str:
    """SHA-256 (hex) of a file; of a folder, of the sorted lines "SHA-256  name" of its entries.

    Raises:
      OSError: if it cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = sorted(os.fsencode(f"{digest(entry)}  {entry.name}\n") for entry in path.iterdir())
    return hashlib.sha256(b"".join(lines)).hexdigest()


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; raises OSError if it cannot be read."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(size(entry) for entry in path.iterdir())


def delete(path: Path) -> None:
    """Deletes a file, or a folder with all in it, or nothing if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
