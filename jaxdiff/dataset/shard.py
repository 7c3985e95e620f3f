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


def marker_name(shard: int, revision: int = 0) -> str:
    """The name of the shard's done-marker."""
    ending = f".r{revision}.json" if revision else ".json"
    return f"{names.DONE}/{shard:05d}{ending}"


def marker_paths(run: Run, shard: int) -> list[Path]:
    """The shard's done-markers, the one that holds last; revisions without a gap."""
    paths = []
    while (path := run.store.path(marker_name(shard, len(paths)))).exists():
        paths.append(path)
    return paths


def forget(run: Run, shard: int) -> None:
    """Deletes the shard's last done-marker, so that the one before it holds, if there is one."""
    marker_paths(run, shard)[-1].unlink()


def read_marker(run: Run, shard: int) -> Marker | None:
    """The shard's last done-marker, None where it is not made yet.

    Raises:
      ValueError: if it is damaged or another plan's.
    """
    paths = marker_paths(run, shard)
    if not paths:
        return None
    revision, path = len(paths) - 1, paths[-1]
    try:
        marker = Marker(**json.loads(path.read_text("utf-8")))
        identity = (run.plan.shard_ids[shard], shard, revision)
        sound = (
            (marker.shard_id, marker.shard, marker.revision) == identity
            and sorted(marker.files) == sorted(run.file_names(shard))
            and re.fullmatch(r"[\w.-]+", marker.attempt)
            and marker.made + marker.failed == run.plan.shard_sizes[shard]
            and all(set(file) == {"sha256", "bytes"} for file in marker.files.values())
        )
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path.relative_to(run.directory)} is damaged or another plan's")
    return marker


def check_files(run: Run, marker: Marker) -> None:
    """Raises InputError unless a made shard's files are as its marker says."""
    for name, file in marker.files.items():
        path = run.store.path(name)
        if not path.exists() or paths.digest(path) != file["sha256"]:
            raise InputError(
                f"{run.directory}: {name} is not as it was made; `jaxdiff verify {run.directory} "
                "--repair` makes it again"
            )


def publish(run: Run, marker: Marker) -> None:
    """Gives a made shard's files their final names; may be repeated."""
    for name in marker.files:
        run.store.publish(marker.attempt, name)


def samples(run: Run, shard: int) -> Iterator[Sample]:
    """Yields the images of a made shard; raises ValueError where it is not one of ours."""
    read = formats.FORMATS[run.plan.settings.format].read
    return read(run.store.path(run.images_name(shard)))


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

    def __init__(self, run: Run, shard: int, revision: int = 0):
        self._run, self._shard, self._revision = run, shard, revision
        self._name = run.store.scratch(f"{shard:05d}").name
        self._images_name, self._metadata_name = run.file_names(shard)
        writer = formats.FORMATS[run.plan.settings.format].writer
        self._writer = writer(self._path(self._images_name))
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
        """Appends an image that was made."""
        self._writer.add(sample)
        outcome = {"status": "made", "file": self._images_name, "bytes": len(sample.image)}
        self._rows.append({**sample.record, **outcome})
        self._report()

    def add_failed(self, planned: PlannedImage, error: str) -> None:
        """Notes an image that could not be made."""
        self._failed += 1
        self._rows.append({**_record(planned, self._run.plan), "status": "failed", "error": error})
        self._report()

    def commit(self, facts: dict) -> bool:
        """Makes the shard final, unless another attempt was first: then False."""
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
        """Puts the files in the places of those that a marker names and that are not as it says.

        Where they are not as it says either, nothing changes.
        """
        if self._finish() != marker.files:
            return
        for name, file in marker.files.items():
            final = self._run.store.path(name)
            if not final.exists() or paths.digest(final) != file["sha256"]:
                self._run.store.publish(self._name, name)

    def _finish(self) -> dict[str, dict]:
        """Ends the files; returns what a marker says of them."""
        self._writer.close()
        metadata = pa.Table.from_pylist(self._rows, METADATA_SCHEMA)
        pq.write_table(metadata, self._path(self._metadata_name))
        facts = {}
        for name in (self._images_name, self._metadata_name):
            self._run.store.stage(self._name, name)
            path = self._path(name)
            facts[name] = {"sha256": paths.digest(path), "bytes": paths.size(path)}
        return facts

    def _committed(self) -> bool:
        """Whether the shard's marker is this attempt's (an NFS server may answer a link twice)."""
        marker = read_marker(self._run, self._shard)
        return marker is not None and marker.attempt == self._name

    def _path(self, name: str) -> Path:
        return self._run.store.staging(self._name, name)

    def _report(self) -> None:
        os.pwrite(self._progress.fileno(), b"%d" % len(self._rows), 0)
