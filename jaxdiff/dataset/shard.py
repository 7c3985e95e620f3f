"""Writing one shard so that it is there whole, or not at all, and never twice.

An attempt writes under temporary names. Then it creates the shard's done-marker with `os.link`,
which is atomic and fails where there is one already: whoever links first has made the shard, and
only then are its files renamed to their final names, which anyone may do again. Two attempts need
not write equal bytes (GPUs choose kernels by timing), so replacing files could leave one attempt's
images beside another's marker; linking cannot.

A made shard is never changed, but it may be revised, by images that had failed and by signatures:
the revision has a done-marker of its own (`00007.r1.json`), made in the same way, and the last one
holds.
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.dataset import formats, image_files
from jaxdiff.dataset import local as layout
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.plan import Plan, PlannedImage
from jaxdiff.errors import InputError

METADATA_SCHEMA = pa.schema(
    [
        *formats.RECORD_FIELDS,
        ("status", pa.string()),  # "made" or "failed"
        ("error", pa.string()),
        ("file", pa.string()),  # the shard that holds the image
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Marker:
    """What a done-marker says: this attempt made the shard.

    Attributes:
      shard_id: the plan's digest of the shard.
      revision: 0 for the first attempt that succeeded.
      attempt: the temporary name of its files, without their endings.
      files: their final names, each with its `sha256` and `bytes`.
      made, failed: how many of the shard's images.
      facts: what the run reports: device, versions, padded slots of batches, seconds by stage.
    """

    shard_id: str
    shard: int
    revision: int
    attempt: str
    files: dict[str, dict]
    made: int
    failed: int
    facts: dict


def file_names(plan: Plan, shard: int) -> tuple[str, str]:
    """The final names of the shard's images and of its metadata."""
    ending, _, _ = formats.FORMATS[plan.settings.format]
    name = f"train-{shard:05d}"
    return f"{layout.DATA}/{name}{'.' * bool(ending)}{ending}", f"{layout.METADATA}/{name}.parquet"


def marker_path(directory: Path, shard: int, revision: int = 0) -> Path:
    """Where the shard's done-marker lies once it is made."""
    ending = f".r{revision}.json" if revision else ".json"
    return directory / layout.DONE / f"{shard:05d}{ending}"


def marker_paths(directory: Path, shard: int) -> list[Path]:
    """The shard's done-markers, the one that holds last; revisions without a gap."""
    paths = []
    while (path := marker_path(directory, shard, len(paths))).exists():
        paths.append(path)
    return paths


def forget(directory: Path, shard: int) -> None:
    """Deletes the shard's last done-marker, so that the one before it holds, if there is one."""
    marker_paths(directory, shard)[-1].unlink()


def read_marker(directory: Path, plan: Plan, shard: int) -> Marker | None:
    """The shard's last done-marker, None where it is not made yet.

    Raises:
      ValueError: if it is damaged or another plan's.
    """
    paths = marker_paths(directory, shard)
    if not paths:
        return None
    revision, path = len(paths) - 1, paths[-1]
    try:
        marker = Marker(**json.loads(path.read_text("utf-8")))
        identity = (plan.shard_ids[shard], shard, revision)
        sound = (
            (marker.shard_id, marker.shard, marker.revision) == identity
            and sorted(marker.files) == sorted(file_names(plan, shard))
            and re.fullmatch(r"[\w.-]+", marker.attempt)
            and marker.made + marker.failed == plan.shard_sizes[shard]
            and all(set(file) == {"sha256", "bytes"} for file in marker.files.values())
        )
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path.relative_to(directory)} is damaged or another plan's")
    return marker


def check_files(directory: Path, marker: Marker) -> None:
    """Raises InputError unless a made shard's files are as its marker says."""
    for name, file in marker.files.items():
        path = directory / name
        if not path.exists() or layout.digest(path) != file["sha256"]:
            raise InputError(
                f"{directory}: {name} is not as it was made; `jaxdiff verify {directory} --repair` "
                "makes it again"
            )


def publish(directory: Path, marker: Marker) -> None:
    """Gives a made shard's files their final names; may be repeated."""
    for name in marker.files:
        (directory / name).parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it has its final name already
            layout.replace(_temporary_path(directory, marker.attempt, name), directory / name)
            layout.sync_folder((directory / name).parent)


def _temporary_path(directory: Path, attempt: str, name: str) -> Path:
    return directory / layout.TMP / f"{attempt}-{Path(name).parent}{Path(name).suffix}"


def encode(planned: PlannedImage, pixels: np.ndarray, plan: Plan) -> Sample:
    """Makes the image file and the record of one image, from pixels of uint8 [h, w, 3]."""
    settings = plan.settings
    record = _record(planned, plan)
    shown = {name: value for name, value in record.items() if name != "metadata"}
    content = image_files.encode(pixels, shown, settings.image_format)
    hashes = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "pixel_sha256": image_files.pixel_sha256(pixels),
    }
    # In the order of the fields, which is the order in the JSON file.
    record = {name: {**record, **hashes}[name] for name, _ in formats.RECORD_FIELDS}
    return Sample(record, content, image_files.EXTENSIONS[settings.image_format])


def _record(planned: PlannedImage, plan: Plan) -> dict:
    """The fields that are known before the image is made."""
    known = planned.columns() | {name: plan.identity[name] for name in ("noise", "dtype", "model")}
    known["options"] = plan.options
    return {name: known[name] for name, _ in formats.RECORD_FIELDS if name in known}


class Attempt:
    """One attempt at a shard: a context that leaves nothing behind unless it is committed.

    Args:
      revision: 0 to make it, one more than its last marker's to revise it.
    """

    def __init__(self, directory: Path, plan: Plan, shard: int, revision: int = 0):
        self._directory, self._plan, self._shard = directory, plan, shard
        self._revision = revision
        self._name = layout.temporary(directory, f"{shard:05d}").name
        self._images_name, self._metadata_name = file_names(plan, shard)
        _, writer, _ = formats.FORMATS[plan.settings.format]
        self._writer = writer(self._path(self._images_name))
        self._progress_path = directory / layout.TMP / f"{self._name}.progress"
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
                layout.delete(self._path(name))
        self._progress.close()
        self._progress_path.unlink(missing_ok=True)

    def add(self, sample: Sample) -> None:
        """Appends an image that was made."""
        self._writer.add(sample)
        outcome = {"status": "made", "file": self._images_name, "bytes": len(sample.image)}
        self._rows.append({**sample.record, **outcome})
        self._report()

    def add_failed(self, planned: PlannedImage, error: str) -> None:
        """Notes an image that could not be made."""
        self._failed += 1
        self._rows.append({**_record(planned, self._plan), "status": "failed", "error": error})
        self._report()

    def commit(self, facts: dict) -> bool:
        """Makes the shard final, unless another attempt was first: then False."""
        marker = Marker(
            shard_id=self._plan.shard_ids[self._shard],
            shard=self._shard,
            revision=self._revision,
            attempt=self._name,
            files=self._finish(),
            made=len(self._rows) - self._failed,
            failed=self._failed,
            facts=facts,
        )
        self._link(marker)
        if self._committed():
            publish(self._directory, marker)
        return self._committed()

    def repair(self, marker: Marker) -> None:
        """Puts the files in the places of those that a marker names and that are not as it says.

        Where they are not as it says either, nothing changes.
        """
        if self._finish() != marker.files:
            return
        for name, file in marker.files.items():
            final = self._directory / name
            if not final.exists() or layout.digest(final) != file["sha256"]:
                layout.replace(self._path(name), final)
                layout.sync_folder(final.parent)

    def _finish(self) -> dict[str, dict]:
        """Ends the files; returns what a marker says of them."""
        self._writer.close()
        metadata = self._path(self._metadata_name)
        with metadata.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(self._rows, METADATA_SCHEMA), file)
            file.flush()
            os.fsync(file.fileno())
        return {
            name: {"sha256": layout.digest(path), "bytes": layout.size(path)}
            for name in (self._images_name, self._metadata_name)
            for path in [self._path(name)]
        }

    def _link(self, marker: Marker) -> None:
        body = self._directory / layout.TMP / f"{self._name}.json"
        final = marker_path(self._directory, self._shard, self._revision)
        final.parent.mkdir(exist_ok=True)
        try:
            with body.open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(marker), indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            layout.sync_folder(body.parent)
            with contextlib.suppress(FileExistsError):
                os.link(body, final)
            layout.sync_folder(final.parent)
        finally:
            body.unlink(missing_ok=True)

    def _committed(self) -> bool:
        """Whether the shard's marker is this attempt's (an NFS server may answer a link twice)."""
        marker = read_marker(self._directory, self._plan, self._shard)
        return marker is not None and marker.attempt == self._name

    def _path(self, name: str) -> Path:
        return _temporary_path(self._directory, self._name, name)

    def _report(self) -> None:
        os.pwrite(self._progress.fileno(), b"%d" % len(self._rows), 0)
