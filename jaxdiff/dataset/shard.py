"""Writes a shard atomically: it appears complete or not at all, and only once.

An attempt writes local files and stages them where nobody reads them. Then it claims the shard's
done-marker, which only one attempt can do. On a disk, the winner's files then get their final
names, and anyone may repeat this step; in a bucket, where nothing can be renamed, they have them
since they were uploaded: the names contain their hash. Two attempts need not write equal bytes
(GPUs choose kernels by timing), so replacing files could combine one attempt's images with
another's marker; claiming cannot.

A finished shard is never changed, but it may be revised, to add images that had failed or to sign
images. A revision has its own done-marker (`00007.r1.json`), created in the same way; the last
marker is the valid one.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jaxdiff.dataset import formats, names, paths
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.plan import Plan, PlannedImage, planned_columns
from jaxdiff.dataset.run import Run
from jaxdiff.errors import InputError
from jaxdiff.images import decoding, fitting, image_files

Check = Literal["size", "etag", "bytes"]
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
      files: their final names, each with its `sha256` and `bytes`, and its `etag` in a bucket.
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
    def images_name(self) -> str:
        """The name of the shard's image file or folder."""
        return next(name for name in self.files if name.startswith(f"{names.DATA}/"))

    @property
    def metadata_name(self) -> str:
        """The name of the shard's metadata file."""
        return next(name for name in self.files if name.startswith(f"{names.METADATA}/"))

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


def marker_names(run: Run, shard: int) -> list[str]:
    """Returns a shard's done-markers without gaps in their revisions, the valid one last."""
    every = (marker_name(shard, revision) for revision in itertools.count())
    return [*itertools.takewhile(lambda name: run.store.kind(name) != "is missing", every)]


def revisions(run: Run) -> dict[int, int]:
    """Returns how many done-markers each finished shard has, from one listing."""
    every = set(run.store.entries(names.DONE))
    found = {}
    for shard in run.shards:
        names_of = (os.path.basename(marker_name(shard, n)) for n in itertools.count())
        count = sum(1 for _ in itertools.takewhile(every.__contains__, names_of))
        if count:
            found[shard] = count
    return found


def read_marker(run: Run, shard: int) -> Marker | None:
    """Returns the shard's last done-marker, or None if the shard is not finished.

    Raises:
      ValueError: if it is damaged or belongs to another plan.
    """
    count = len(marker_names(run, shard))
    return read_revision(run, shard, count - 1) if count else None


def read_markers(run: Run, shard: int) -> list[Marker]:
    """Returns all of a shard's done-markers; raises ValueError as `read_marker` does."""
    return [read_revision(run, shard, n) for n in range(len(marker_names(run, shard)))]


def read_revision(run: Run, shard: int, revision: int) -> Marker:
    """Returns one of a shard's done-markers; raises ValueError as `read_marker` does."""
    name = marker_name(shard, revision)
    if (why := run.store.kind(name)) == "is a link":  # which may point to a sound marker
        raise ValueError(f"{name} {why}")
    try:
        marker = Marker(**json.loads(run.store.read(name)))
        identity = (run.plan.shard_ids[shard], shard, revision)
        sound = (
            (marker.shard_id, marker.shard, marker.revision) == identity
            and _are_named(run, marker)
            and re.fullmatch(r"[\w.-]+", marker.attempt)
            and min(marker.made, marker.failed) >= 0
            and marker.made + marker.failed == run.plan.shard_sizes[shard]
            and all(_is_sound(**file) for file in marker.files.values())
            and _are_sound(**marker.facts)
        )
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{name} is damaged or belongs to another plan")
    return marker


def _are_named(run: Run, marker: Marker) -> bool:
    """Returns whether a marker names the shard's files, as a disk or a bucket has them."""
    plain = sorted(run.file_names(marker.shard))
    hashed = sorted(
        names.hashed(name, marker.revision, file["sha256"])
        for name, file in zip(plain, (marker.files[n] for n in sorted(marker.files)), strict=True)
    )
    return sorted(marker.files) in (plain, hashed)


def _is_sound(sha256: str, bytes: int, etag: str | None = None) -> bool:
    is_text = etag is None or isinstance(etag, str)
    return bool(re.fullmatch(r"[0-9a-f]{64}", sha256)) and type(bytes) is int and is_text


def _are_sound(device: str, padded: int, versions: dict, seconds: dict, **_) -> bool:
    """Returns whether a marker's facts can be reported; later versions may note more."""
    numbers = [padded, seconds["generate"], *seconds.values()]
    return all(isinstance(number, int | float) for number in numbers) and all(
        isinstance(text, str) for text in (device, *versions.values())
    )


def why_not(run: Run, marker: Marker, name: str, check: Check = "bytes") -> str | None:
    """Returns why a shard's file, or folder, is not what its marker names; None if it is.

    Args:
      check: "size" looks no further; "etag" reads the bytes only if the store does not call them
        what it called them when they were written.
    """
    file, store = marker.files[name], run.store
    if run.is_folder(name):
        why = paths.wrong_kind_within(store.path(name), folder=True)
    else:
        why = store.kind(name)
    if why:
        return why
    if (size := store.size(name)) != file["bytes"]:
        return f"has {size} bytes instead of {file['bytes']}"
    etag = file.get("etag")
    if check == "size" or (check == "etag" and etag and store.etag(name) == etag):
        return None
    if store.digest(name) != file["sha256"]:
        return f"has changed: its SHA-256 is not {file['sha256']}"
    return None


def check_files(run: Run, marker: Marker) -> None:
    """Raises InputError unless a finished shard's files match its marker."""
    for name in marker.files:
        if why_not(run, marker, name):
            raise InputError(
                f"{run.address}: {name} is missing or has changed; run `jaxdiff verify "
                f"{run.address} --repair` to generate it again"
            )


def publish(run: Run, marker: Marker) -> None:
    """Gives a finished shard's files their final names; may be repeated."""
    for name in marker.files:
        run.store.publish(marker.attempt, name)


def samples(run: Run, marker: Marker, local: LocalStore) -> Iterator[Sample]:
    """Yields the images of a finished shard; raises ValueError if it is invalid.

    Args:
      local: has the shard's files: what `fetched` of the run's store yields.
    """
    read = formats.FORMATS[run.plan.settings.format].read
    return read(local.path(marker.images_name))


def records(images: Sequence[PlannedImage], plan: Plan) -> list[dict]:
    """Returns the fields of images' records that are known before they are generated."""
    columns = planned_columns(images)
    for name in ("noise", "dtype", "model"):
        columns[name] = [plan.identity[name]] * len(images)
    columns["options"] = [plan.options] * len(images)
    columns["model_name"] = [plan.model_name] * len(images)
    if plan.upscales:
        for name, sides in zip(formats.UPSCALED, ("width", "height"), strict=True):
            columns[name] = [fitting.enlarged(side, plan.upscales) for side in columns[sides]]
    known = [name for name, _ in plan.record_fields if name in columns]
    rows = zip(*(columns[name] for name in known), strict=True)
    return [dict(zip(known, row, strict=True)) for row in rows]


def encode(planned: PlannedImage, pixels: np.ndarray, plan: Plan) -> Sample:
    """Returns the file and record of one image.

    Args:
      pixels: uint8 [height, width, 3], or [..., 4] with opacity, which JPEG shows on white.
    """
    settings = plan.settings
    if pixels.shape[-1] == 4 and settings.image_format not in image_files.LOSSLESS:
        pixels = decoding.rgb(Image.fromarray(pixels), planned.key)
    (known,) = records([planned], plan)
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
        self._writer = writer(self._path(self._images_name), run.plan.shard_fields)
        self._progress_path = run.store.work() / f"{self._name}.progress"
        self._progress = self._progress_path.open("wb", buffering=0)
        self._rows: list[dict] = []
        self._failed = 0
        self._is_first: bool | None = None  # not known

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            self._writer.close()
        if not (self._committed() if self._is_first is None else self._is_first):
            for name in (self._images_name, self._metadata_name):
                paths.delete(self._path(name))
        self._progress.close()
        self._progress_path.unlink(missing_ok=True)

    def add(self, sample: Sample) -> None:
        """Appends a generated image."""
        self._writer.add(sample)
        outcome = {"status": "made", "bytes": len(sample.image)}
        self._rows.append({**sample.record, **outcome})
        self._report()

    @property
    def image_bytes(self) -> list[int]:
        """The size of each image's file so far."""
        return [row["bytes"] for row in self._rows if row["status"] == "made"]

    def add_failed(self, planned: PlannedImage, error: str) -> None:
        """Records an image that failed."""
        self._failed += 1
        (known,) = records([planned], self._run.plan)
        self._rows.append({**known, "status": "failed", "error": error})
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
        said = self._run.store.claim(marker_name(self._shard, self._revision), body)
        self._is_first = said == body
        if self._is_first:
            publish(self._run, marker)
        else:
            winner = read_revision(self._run, self._shard, self._revision)
            self._run.store.withdraw(marker.files.keys() - winner.files.keys())
        return self._is_first

    def repair(self, marker: Marker) -> None:
        """Replaces the missing or changed files of a marker with the files of this attempt.

        If these do not match the marker either, nothing changes.
        """
        made = self._finish(marker)
        if any(made[name]["sha256"] != file["sha256"] for name, file in marker.files.items()):
            return
        for name in marker.files:
            if why_not(self._run, marker, name):
                final = self._run.store.path(name)
                if paths.wrong_kind(final, self._run.is_folder(name)):
                    paths.delete(final)  # a folder cannot replace a file, nor a file a folder
                self._run.store.publish(self._name, name)

    def _finish(self, repaired: Marker | None = None) -> dict[str, dict]:
        """Closes and stages the files; returns their entries for a marker.

        Args:
          repaired: the marker whose names they will have; by default, the store finds names.
        """
        self._writer.close()
        images = self._staged(self._images_name, repaired and repaired.images_name)
        for row in self._rows:
            if row["status"] == "made":
                row["file"] = next(iter(images))
        metadata = pa.Table.from_pylist(self._rows, metadata_schema(self._run.plan))
        pq.write_table(metadata, self._path(self._metadata_name))
        return images | self._staged(self._metadata_name, repaired and repaired.metadata_name)

    def _staged(self, name: str, final: str | None) -> dict[str, dict]:
        path, store = self._path(name), self._run.store
        sha256, size = paths.digest(path), paths.size(path)
        final = final or store.final_name(name, self._revision, sha256)
        etag = store.stage(self._name, name, final)
        return {final: {"sha256": sha256, "bytes": size} | ({"etag": etag} if etag else {})}

    def _committed(self) -> bool:
        """Returns whether the marker is this attempt's, as far as can be known."""
        try:
            marker = read_marker(self._run, self._shard)
        except OSError:
            return True
        return marker is not None and marker.attempt == self._name

    def _path(self, name: str) -> Path:
        return self._run.store.staging(self._name, name)

    def _report(self) -> None:
        # Of fixed width: a reader may see a longer number's end behind an older one's start.
        os.pwrite(self._progress.fileno(), b"%09d" % len(self._rows), 0)
