"""A dataset in a bucket of Amazon S3, Google Cloud Storage or Azure.

Nothing is renamed or overwritten but reports, and no lock is held. A shard's files are uploaded
under names that contain their hash, so attempts never meet; then the done-marker is created if
there is none, which the service decides. An answer proves little: after a failed or repeated
request, "already exists" may mean this process's own object, so `claim` compares bytes.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import ClassVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from jaxdiff.dataset import names, probe
from jaxdiff.dataset.local import LocalStore, delete_lost
from jaxdiff.dataset.lock import Unlocked
from jaxdiff.dataset.probe import PROBLEMS, reason
from jaxdiff.errors import InputError

CLIENTS = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
ADDRESS = re.compile(r"(s3|gs|az)://([^/?#]+)(/[^?#]*)?")
REQUEST_SECONDS, UPLOAD_SECONDS = 30.0, 600.0  # completing a large upload takes long
CLAIM_SECONDS = 60.0  # how long to ask for an answer that is sure
TRIES = 3  # of uploads and deletions: the client does not repeat all that may be repeated
AT_ONCE = 32  # small objects to read concurrently
READ_AHEAD = 2**20


@dataclass(frozen=True)
class Bucket:
    """A store under an address such as s3://bucket/prefix, gs://bucket/prefix or az://container.

    Credentials and endpoints come from the environment, as the services' own tools read them, or
    from the machine's identity.

    Attributes:
      renames: whether finished files may wait for their final names: no.
      address: where the dataset is, without a slash at its end.
      listed: what was there when `snapshot` was called: sizes, and the bytes of done-markers.
    """

    renames: ClassVar[bool] = False

    address: str
    listed: "Listed | None" = None

    def scratch(self, name: str) -> Path:
        """Returns a new, unique local path for a file or folder."""
        unique = f"{name}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        return self.work() / unique

    def work(self) -> Path:
        """Returns the local folder of unfinished files, in TMPDIR; creates it."""
        user, known = os.getuid(), hashlib.sha256(self.address.encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"jaxdiff-{user}-{known}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != user:
            raise OSError(errno.EPERM, "belongs to somebody else; set TMPDIR", str(folder))
        return folder

    # What is there.

    def kind(self, name: str, folder: bool = False) -> str | None:
        """Returns "is missing" unless there is an object of this name, or one in the folder."""
        if folder:
            there = next(iter(self._names(f"{name}/")), None) is not None
        elif self.listed and self.listed.has(name):
            there = name in self.listed.sizes
        else:
            there = self._head(name) is not None
        return None if there else "is missing"

    def entries(self, folder: str) -> list[str]:
        """Returns the sorted names of the objects and folders in a folder; "" is the top."""
        start = f"{folder}/" if folder else ""
        if self.listed and self.listed.has(start):
            every = [name for name in self.listed.sizes if name.startswith(start)]
        else:
            with self._named(start):
                found = obstore.list_with_delimiter(self._client(), start or None)
            every = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted({name[len(start) :].partition("/")[0] for name in every})

    def read(self, name: str) -> bytes:
        """Returns an object's bytes; raises ValueError if it is missing."""
        if self.listed and name in self.listed.markers:
            return self.listed.markers[name]
        content = self._get(name)
        if content is None:
            raise ValueError(f"{name} is missing")
        return content

    def size(self, name: str) -> int:
        """Returns an object's size in bytes; raises FileNotFoundError if it is missing."""
        return self._found(name)["size"]

    def etag(self, name: str) -> str | None:
        """Returns what the service calls this version of an object's bytes."""
        return _plain(self._found(name)["e_tag"])

    def digest(self, name: str) -> str:
        """Returns the SHA-256 (hex) of an object; raises FileNotFoundError if it is missing."""
        with self._named(name):
            whole = hashlib.sha256()
            for part in obstore.get(self._client(UPLOAD_SECONDS), name):
                whole.update(part)
        return whole.hexdigest()

    def open(self, name: str) -> io.BufferedReader:
        """Returns a seekable file that reads parts of an object as they are asked for."""
        return io.BufferedReader(_Ranges(self, name, self.size(name)), READ_AHEAD)

    def version(self, name: str) -> str:
        """Returns a text that changes with an object's bytes."""
        return str(self.etag(name))

    @contextlib.contextmanager
    def fetched(self, *every: str) -> Iterator[LocalStore]:
        """Yields a local store with copies of those of the objects that exist."""
        folder = self.scratch("fetched")
        folder.mkdir()
        with contextlib.ExitStack() as afterwards:
            afterwards.callback(shutil.rmtree, folder, ignore_errors=True)
            local = LocalStore(folder)
            for name in every:
                with contextlib.suppress(FileNotFoundError), self._named(name):
                    parts = obstore.get(self._client(UPLOAD_SECONDS), name)
                    local.path(name).parent.mkdir(parents=True, exist_ok=True)
                    with local.path(name).open("wb") as file:
                        file.writelines(parts)
            yield local

    @contextlib.contextmanager
    def filled(self, *replaced: str) -> Iterator[Path]:
        """Yields a scratch folder, and uploads its files afterwards, unless there is an error.

        Args:
          replaced: names of folders; other objects in them are deleted afterwards.
        """
        folder = self.scratch("filled")
        folder.mkdir()
        try:
            yield folder
            files = (path for path in folder.rglob("*") if path.is_file())
            written = {path.relative_to(folder).as_posix(): path for path in files}
            old = {name for each in replaced for name in self._names(f"{each}/")}
            with ThreadPoolExecutor(AT_ONCE) as threads:
                for _ in threads.map(self._replace, written, written.values()):
                    pass
                for _ in threads.map(self._delete, old - written.keys()):
                    pass
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def snapshot(self) -> "Bucket":
        """Returns a store that knows what is there now, from a listing of each folder.

        A snapshot returns itself.
        """
        if self.listed:
            return self
        sizes = {}
        for folder in (names.DONE, names.DATA, names.METADATA):
            sizes |= {meta["path"]: meta for meta in self._list(f"{folder}/")}
        markers = [name for name in sizes if name.startswith(f"{names.DONE}/")]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            bodies = threads.map(self._get, markers)
            read = {n: body for n, body in zip(markers, bodies, strict=True) if body is not None}
        return replace(self, listed=Listed(sizes, read))

    # Writing.

    def staging(self, attempt: str, name: str) -> Path:
        """Returns the local path where an attempt writes the file to upload as `name`."""
        return self.work() / f"{attempt}-{PurePosixPath(name).parent}{PurePosixPath(name).suffix}"

    def final_name(self, name: str, revision: int, sha256: str) -> str:
        """Returns a name that no other content has."""
        return names.hashed(name, revision, sha256)

    def stage(self, attempt: str, name: str, final: str) -> str | None:
        """Uploads the file at `staging`; returns its etag."""
        return self._upload(self.staging(attempt, name), final)

    def publish(self, attempt: str, name: str) -> None:
        """Deletes the local copy: uploaded files have their final names."""
        self.staging(attempt, name).unlink(missing_ok=True)

    def withdraw(self, every: Iterable[str]) -> None:
        """Deletes files of an attempt that was not the first; what remains is swept later."""
        with contextlib.suppress(OSError):
            self.delete(*every)

    def claim(self, name: str, content: str) -> str:
        """Creates a small object unless it exists; returns its content, which never changes.

        Raises:
          OSError: if nobody can say whether it was created. Then nothing may be deleted: the
            request may still arrive.
        """
        body, end, pause = content.encode(), time.monotonic() + CLAIM_SECONDS, 0.1
        while True:
            try:
                obstore.put(self._client(), name, body, mode="create", use_multipart=False)
                return content
            except PROBLEMS as problem:
                why = reason(problem)
            with contextlib.suppress(*PROBLEMS):
                found = self._get(name)
                if found is not None:
                    return found.decode("utf-8", "backslashreplace")
            if time.monotonic() > end:
                said = f"cannot be written with certainty ({why})"
                raise OSError(errno.EIO, said, self._full(name))
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def swap(self, name: str, content: str) -> None:
        """Replaces a small object: readers see the old content or the new."""
        with self._named(name):
            body = content.encode("utf-8", "backslashreplace")
            obstore.put(self._client(), name, body, use_multipart=False)

    def delete(self, *every: str) -> None:
        """Deletes objects; does nothing for those that do not exist."""
        for name in every:
            self._delete(name)

    def begin(self, folder: Path, extended: str | None = None) -> None:
        """Uploads a plan from a folder; the first of several processes wins.

        Args:
          extended: the id of the plan that this one extends.

        Raises:
          InputError: if another process has replaced that plan.
        """
        content = (folder / names.PLAN_JSON).read_text("utf-8")
        others = {f"{names.PLAN}/{path.name}": path for path in folder.iterdir()}
        del others[names.PLAN_FILE]
        for name, path in others.items():
            self._upload(path, name)
        if extended is None:
            self.claim(names.PLAN_FILE, content)
            return
        with self._named(names.PLAN_FILE):
            found = obstore.get(self._client(), names.PLAN_FILE)
            version = {name: found.meta[name] for name in ("e_tag", "version")}
            old = bytes(found.bytes())
        mode = {name: value for name, value in version.items() if value is not None}
        if json.loads(old)["id"] == extended:
            self.delete(names.SUCCESS, names.REPORT)  # they belong to the old plan
            with contextlib.suppress(*PROBLEMS):  # it may have been done; what is there decides
                obstore.put(self._client(), names.PLAN_FILE, content.encode(), mode=mode)
        if self.read(names.PLAN_FILE) != content.encode():
            raise InputError(
                f"{self.address}: another process replaced the plan; run the command again"
            )
        for name, path in others.items():
            if self.kind(name):  # a process that finished the old plan has deleted it
                self._upload(path, name)

    # The job.

    def prepare(self) -> None:
        """Checks that the bucket can be used.

        Raises:
          InputError: if it cannot be reached, or ignores conditions.
          OSError: for other problems, which may pass.
        """
        with probe.explained(self.address):
            probe.check(self.address, _client(self.address, REQUEST_SECONDS, retries=2))

    @contextlib.contextmanager
    def held(self, waiting: Callable[[], None] | None = None) -> Iterator[Unlocked]:
        """Checks that the bucket can hold a dataset; any number of processes may be there.

        Raises:
          InputError: if it cannot be reached, ignores conditions, or has other objects.
        """
        self.prepare()
        top = [name for name in self.entries("") if name != names.WORK]
        if top and self.kind(names.PLAN_FILE):
            raise InputError(
                f"--output {self.address} holds other objects and no jaxdiff run ({top[0]}); name "
                "a new prefix"
            )
        yield Unlocked()
        self.sweep()

    def has_shards(self) -> bool:
        """Returns whether the run has a finished shard."""
        return self.kind(names.DONE, folder=True) is None

    def clear(self) -> None:
        """Deletes a run without shards, the plan first."""
        self.delete(names.PLAN_FILE, *self._names(f"{names.WORK}/"), names.REJECTED)

    def sweep(self) -> None:
        """Deletes the unfinished files of dead processes on this host."""
        delete_lost(self.work())

    def forget_old(self) -> None:
        """Does nothing: no run is set aside in a bucket."""

    # Requests.

    def _client(self, seconds: float | None = None):
        return _client(self.address, seconds or REQUEST_SECONDS)

    def _full(self, name: str) -> str:
        return f"{self.address}/{name}"

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Turns the client's errors into OSErrors that name the object."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "is missing", self._full(name)) from None
        except PROBLEMS as problem:
            raise OSError(errno.EIO, reason(problem), self._full(name)) from None

    def _get(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError), self._named(name):
            return bytes(obstore.get(self._client(), name).bytes())
        return None

    def _head(self, name: str) -> dict | None:
        with contextlib.suppress(FileNotFoundError), self._named(name):
            return obstore.head(self._client(), name)
        return None

    def _found(self, name: str) -> Mapping:
        known = self.listed.sizes.get(name) if self.listed else None
        found = known or self._head(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "is missing", self._full(name))
        return found

    def _list(self, start: str) -> Iterator[dict]:
        with self._named(start):
            for part in obstore.list(self._client(), start or None, chunk_size=1000):
                yield from part

    def _names(self, start: str) -> Iterator[str]:
        if self.listed and self.listed.has(start):
            return (name for name in self.listed.sizes if name.startswith(start))
        return (meta["path"] for meta in self._list(start))

    def _delete(self, name: str) -> None:
        for left in reversed(range(TRIES)):
            try:
                with contextlib.suppress(FileNotFoundError), self._named(name):
                    obstore.delete(self._client(), name)
                return
            except OSError:
                if not left:
                    raise

    def _replace(self, name: str, path: Path) -> None:
        with self._named(name):
            obstore.put(self._client(UPLOAD_SECONDS), name, path)

    def _upload(self, path: Path, name: str) -> str | None:
        """Uploads a file and returns its etag; a failed request may have been done after all."""
        size = path.stat().st_size
        for left in reversed(range(TRIES)):
            try:
                return _plain(obstore.put(self._client(UPLOAD_SECONDS), name, path)["e_tag"])
            except PROBLEMS as problem:
                why = reason(problem)
            with contextlib.suppress(OSError):
                found = self._head(name)
                if found and found["size"] == size:
                    return _plain(found["e_tag"])
            if left:
                time.sleep(1.0)
        raise OSError(errno.EIO, f"cannot be uploaded ({why})", self._full(name))


@dataclass(frozen=True)
class Listed:
    """What was in the folders of shards: each object's properties, and the done-markers' bytes."""

    sizes: Mapping[str, Mapping]
    markers: Mapping[str, bytes]

    def has(self, name: str) -> bool:
        """Returns whether the folder of this name was listed."""
        return name.startswith((f"{names.DONE}/", f"{names.DATA}/", f"{names.METADATA}/"))


class _Ranges(io.RawIOBase):
    """An object as a seekable file."""

    def __init__(self, bucket: Bucket, name: str, size: int):
        self._bucket, self._name, self._size, self._at = bucket, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer) -> int:
        count = max(min(len(buffer), self._size - self._at), 0)
        if count:
            with self._bucket._named(self._name):
                part = obstore.get_range(
                    self._bucket._client(), self._name, start=self._at, length=count
                )
            buffer[:count] = bytes(part)
            self._at += count
        return count


@functools.lru_cache
def _client(address: str, seconds: float, retries: int = 10):
    service, container, prefix = ADDRESS.fullmatch(address).groups()
    return CLIENTS[service](
        container,
        prefix=(prefix or "").strip("/") or None,
        client_options={
            "timeout": timedelta(seconds=seconds),
            "allow_http": True,  # an endpoint on the own machine or network says so itself
        },
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=6 * seconds),
        },
    )


def _plain(etag: str | None) -> str | None:
    """Returns an etag without quotes, which Azure's listings do not have."""
    return etag and etag.strip('"')


def open_bucket(address: str) -> Bucket:
    """Returns the store at an address; raises InputError if it is no bucket's."""
    if not ADDRESS.fullmatch(address):
        raise InputError(
            f"{address} is not the address of a bucket; write s3://BUCKET/PREFIX, "
            "gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
        )
    return Bucket(address.rstrip("/"))
