"""Writes a shard atomically: it appears complete or not at all, and only once.

An attempt writes under temporary names. Then it creates the shard's done-marker with `os.link`,
which is atomic and fails if the marker exists. The first attempt to link wins; only then are its
files renamed to their final names, and anyone may repeat this step. Two attempts need not write
equal bytes (GPUs choose kernels by timing), so replacing files could combine one attempt's images
with another's marker; linking cannot.

A finished shard is never changed, but it may be revised, to add images that had failed or to sign
images. A revision has its own done-marker (`00007.r1.json`), created in the same way; the last
marker is the valid one.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.dataset import formats, image_files, names, paths
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.plan import Plan, PlannedImage
from jaxdiff.dataset.run import Run
from jaxdiff.errors import InputError

OUTCOME_FIELDS = (
    ("status", pa.string()),  # "made" or "failed"
    ("error", pa.string()),
    ("file", pa.string()),  # the shard that contains the image
    ("bytes", pa.int64()),
)
METADATA_SCHEMA = pa.schema([*formats.RECORD_FIELDS, *OUTCOME_FIELDS])


def metadata_schema(plan: Plan) -> pa.Schema:
    """Returns the schema of the metadata of a plan's shards, which may lack a later column."""
    return pa.schema([*plan.record_fields, *OUTCOME_FIELDS])


@dataclass(frozen=True)
class Marker:
    """The content of a done-marker, which names the attempt that wrote the shard.

    Attributes:
      shard_id: the shard's id in the plan.
      revision: 0 for the first version of the shard.
      attempt: the temporary name of its files, without their endings.
      files: their final names, each with its `sha256` and `bytes`.
      made, failed: the numbers of generated and failed images.
      facts: data for the run's report: device, versions, padded batch slots, seconds per stage.
    """

    shard_id: str
    shard: int
    revision: int
    attempt: str
    files: dict[str, dict]
    made: int
    failed: int
    facts: dict

    @property
    def content(self) -> str:
        """The digest of what the shard holds: equal for equal images, whenever they are made."""
        lines = [f"{file['sha256']}  {name}\n" for name, file in sorted(self.files.items())]
        lines.append(f"{self.made} made, {self.failed} failed\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def marker_name(shard: int, revision: int = 0) -> str:
    """Returns the name of the shard's done-marker."""
    ending = f".r{revision}.json" if revision else ".json"
    return f"{names.DONE}/{shard:05d}{ending}"


def marker_paths(run: Run, shard: int) -> list[Path]:
    """Returns the shard's done-markers without gaps in their revisions, the valid one last."""
    paths = []
    while os.path.lexists(path := run.store.path(marker_name(shard, len(paths)))):
        paths.append(path)
    return paths


def marker_names(run: Run, shard: int) -> list[str]:
    """Returns the names of `marker_paths`."""
    return [path.relative_to(run.directory).as_posix() for path in marker_paths(run, shard)]


def read_marker(run: Run, shard: int) -> Marker | None:
    """Returns the shard's last done-marker, or None if the shard is not finished.

    Raises:
      ValueError: if it is damaged or belongs to another plan.
    """
    revisions = len(marker_paths(run, shard))
    return read_revision(run, shard, revisions - 1) if revisions else None


def read_markers(run: Run, shard: int) -> list[Marker]:
    """Returns all of a shard's done-markers; raises ValueError as `read_marker` does."""
    revisions = range(len(marker_paths(run, shard)))
    return [read_revision(run, shard, revision) for revision in revisions]


def read_revision(run: Run, shard: int, revision: int) -> Marker:
    """Returns one of a shard's done-markers; raises ValueError as `read_marker` does."""
    name = marker_name(shard, revision)
    path = run.store.path(name)
    if (why := paths.wrong_kind(path)) == "is a link":  # which may point to a sound marker
        raise ValueError(f"{name} {why}")
    try:
        marker = Marker(**json.loads(paths.read(path)))
        identity = (run.plan.shard_ids[shard], shard, revision)
        sound = (
            (marker.shard_id, marker.shard, marker.revision) == identity
            and sorted(marker.files) == sorted(run.file_names(shard))
            and re.fullmatch(r"[\w.-]+", marker.attempt)
            and min(marker.made, marker.failed) >= 0
            and marker.made + marker.failed == run.plan.shard_sizes[shard]
            and all(_is_sound(**file) for file in marker.files.values())
            and _are_sound(**marker.facts)
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{name} is damaged or belongs to another plan")
    return marker


def _is_sound(sha256: str, bytes: int) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{64}", sha256)) and type(bytes) is int


def _are_sound(device: str, padded: int, versions: dict, seconds: dict, **_) -> bool:
    """Returns whether a marker's facts can be reported; later versions may note more."""
    numbers = [padded, seconds["generate"], *seconds.values()]
    return all(isinstance(number, int | float) for number in numbers) and all(
        isinstance(text, str) for text in (device, *versions.values())
    )


def why_not(run: Run, marker: Marker, name: str, deep: bool = True) -> str | None:
    """Returns why a shard's file, or folder, is not what its marker names; None if it is.

    Args:
      deep: also checks its bytes, not only its size.
    """
    path, file = run.store.path(name), marker.files[name]
    if why := paths.wrong_kind_within(path, run.is_folder(name)):
        return why
    if (size := paths.size(path)) != file["bytes"]:
        return f"has {size} bytes instead of {file['bytes']}"
    if deep and paths.digest(path) != file["sha256"]:
        return f"has changed: its SHA-256 is not {file['sha256']}"
    return None


def check_files(run: Run, marker: Marker) -> None:
    """Raises InputError unless a finished shard's files match its marker."""
    for name in marker.files:
        if why_not(run, marker, name):
            raise InputError(
                f"{run.directory}: {name} is missing or has changed; run `jaxdiff verify "
                f"{run.directory} --repair` to generate it again"
            )


def publish(run: Run, marker: Marker) -> None:
    """Gives a finished shard's files their final names; may be repeated."""
    for name in marker.files:
        run.store.publish(marker.attempt, name)


def samples(run: Run, shard: int) -> Iterator[Sample]:
    """Yields the images of a finished shard; raises ValueError if it is invalid."""
    read = formats.FORMATS[run.plan.settings.format].read
    return read(run.store.path(run.images_name(shard)))


def record(planned: PlannedImage, plan: Plan) -> dict:
    """Returns the fields of an image's record that are known before it is generated."""
    known = planned.columns() | {name: plan.identity[name] for name in ("noise", "dtype", "model")}
    known["options"] = plan.options
    return {name: known[name] for name, _ in plan.record_fields if name in known}


def encode(planned: PlannedImage, pixels: np.ndarray, plan: Plan) -> Sample:
    """Returns the file and record of one image, from pixels of uint8 [height, width, 3]."""
    settings = plan.settings
    known = record(planned, plan)
    shown = {name: value for name, value in known.items() if name != "metadata"}
    content = image_files.encode(pixels, shown, settings.image_format)
    hashes = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "pixel_sha256": image_files.pixel_sha256(pixels),
    }
    # In the order of the fields, which is also the order in the JSON file.
    whole = {name: {**known, **hashes}[name] for name, _ in plan.record_fields}
    return Sample(whole, content, image_files.EXTENSIONS[settings.image_format])


class Attempt:
    """One attempt to write a shard: a context manager that leaves no files unless committed.

    Args:
      revision: 0 for a new shard; to revise one, its last marker's revision plus 1.
    """

    def __init__(self, run: Run, shard: int, revision: int = 0):
        self._run, self._shard, self._revision = run, shard, revision
        self._name = run.store.scratch(f"{shard:05d}").name
        self._images_name, self._metadata_name = run.file_names(shard)
        writer = formats.FORMATS[run.plan.settings.format].writer
        self._writer = writer(self._path(self._images_name), run.plan.record_fields)
        self._progress_path = run.store.path(f"{names.TMP}/{self._name}.progress")
        self._progress = self._progress_path.open("wb", buffering=0)
        self._rows: list[dict] = []
        self._failed = 0

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            self._writer.close()
        if not self._committed():
            for name in (self._images_name, self._metadata_name):
                paths.delete(self._path(name))
        self._progress.close()
        self._progress_path.unlink(missing_ok=True)

    def add(self, sample: Sample) -> None:
        """Appends a generated image."""
        self._writer.add(sample)
        outcome = {"status": "made", "file": self._images_name, "bytes": len(sample.image)}
        self._rows.append({**sample.record, **outcome})
        self._report()

    def add_failed(self, planned: PlannedImage, error: str) -> None:
        """Records an image that failed."""
        self._failed += 1
        self._rows.append({**record(planned, self._run.plan), "status": "failed", "error": error})
        self._report()

    def commit(self, facts: dict) -> bool:
        """Makes the shard final; returns False if another attempt was first."""
        marker = Marker(
            shard_id=self._run.plan.shard_ids[self._shard],
            shard=self._shard,
            revision=self._revision,
            attempt=self._name,
            files=self._finish(),
            made=len(self._rows) - self._failed,
            failed=self._failed,
            facts=facts,
        )
        body = json.dumps(asdict(marker), indent=2) + "\n"
        self._run.store.claim(marker_name(self._shard, self._revision), body)
        if self._committed():
            publish(self._run, marker)
        return self._committed()

    def repair(self, marker: Marker) -> None:
        """Replaces the missing or changed files of a marker with the files of this attempt.

        If these do not match the marker either, nothing changes.
        """
        if self._finish() != marker.files:
            return
        for name in marker.files:
            if why_not(self._run, marker, name):
                final = self._run.store.path(name)
                if paths.wrong_kind(final, self._run.is_folder(name)):
                    paths.delete(final)  # a folder cannot replace a file, nor a file a folder
                self._run.store.publish(self._name, name)

    def _finish(self) -> dict[str, dict]:
        """Closes the files; returns their entries for a marker."""
        self._writer.close()
        metadata = pa.Table.from_pylist(self._rows, metadata_schema(self._run.plan))
        pq.write_table(metadata, self._path(self._metadata_name))
        facts = {}
        for name in (self._images_name, self._metadata_name):
            self._run.store.stage(self._name, name)
            path = self._path(name)
            facts[name] = {"sha256": paths.digest(path), "bytes": paths.size(path)}
        return facts

    def _committed(self) -> bool:
        """Returns whether the marker is this attempt's (NFS may report a link twice)."""
        marker = read_marker(self._run, self._shard)
        return marker is not None and marker.attempt == self._name

    def _path(self, name: str) -> Path:
        return self._run.store.staging(self._name, name)

    def _report(self) -> None:
        os.pwrite(self._progress.fileno(), b"%d" % len(self._rows), 0)
