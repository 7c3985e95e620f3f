"""The plan: which image stands in which batch of which shard, fixed before anything is made.

A plan is a Parquet file with a row an image and a row group a shard, never changed once it lies in
`_jaxdiff/plan/`. Shards are pure: all their images can run through one compiled program. The
plan's id is the digest of everything that decides the dataset's bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.checkpoint.ensemble import Ensemble
from jaxdiff.checks import BadValueError
from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import formats, manifest, rows
from jaxdiff.dataset.settings import Settings
from jaxdiff.errors import InputError
from jaxdiff.request import Bucket, Options, Request

VERSION = 2
MAX_IMAGES = 10**9  # keys have 9 digits
MIN_TORCH_VALUES = 16  # of one image; PyTorch draws fewer in another way
DEFAULT_SHARD_IMAGES = 1000
DEFAULT_SHARD_PX = 2**28  # 1000 images of 512x512, fewer when they are larger
# The job's own, or not known yet.
NOT_PLANNED = ("noise", "dtype", "options", "model", "sha256", "pixel_sha256")
SCHEMA = pa.schema(
    [
        *(field for field in formats.RECORD_FIELDS if field[0] not in NOT_PLANNED),
        ("line", pa.int64()),
    ]
)
REQUEST_COLUMNS = tuple(field.name for field in fields(Request))


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image to make.

    Attributes:
      key: its place in the manifest's order, 9 digits.
      id: its row's.
      image_index: which of its row's images it is.
      request: resolved; nothing is left to the model.
      metadata: its row's other columns, a JSON object.
      line: of its row in the manifest.
    """

    key: str
    id: str
    image_index: int
    request: Request
    metadata: str
    line: int

    def columns(self) -> dict:
        """The image as a row of the plan."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | vars(own.pop("request"))


@dataclass(frozen=True)
class Plan:
    """What `plan.json` says.

    Attributes:
      identity: all that decides the dataset's bytes; `id` is its digest.
      manifest: the path that it was made from.
      model_name: the model's name; its fingerprint stands in `identity`.
      rows: how many of the manifest's rows are blank, rejected and accepted.
      shard_sizes: images in each shard.
      sha256: of the plan's other files, by name.
    """

    id: str
    identity: dict
    manifest: str
    model_name: str
    rows: dict[str, int]
    shard_sizes: list[int]
    sha256: dict[str, str]

    @property
    def settings(self) -> Settings:
        """The settings that it was made with."""
        return Settings(**{field.name: self.identity[field.name] for field in fields(Settings)})

    @property
    def options(self) -> str:
        """The model's options that are not as usual: "name=value, name=value"."""
        settings, elsewhere = self.settings, ("noise", "dtype", "mesh", "scheduler")
        changed = [
            f"{field.name}={getattr(settings, field.name)}"
            for field in fields(Options)
            if field.name not in elsewhere and getattr(settings, field.name) != field.default
        ]
        return ", ".join(changed + [settings.scheduler] * bool(settings.scheduler))

    @property
    def images(self) -> int:
        """How many images are planned."""
        return sum(self.shard_sizes)


def identify(path: Path, settings: Settings, model: Ensemble) -> dict:
    """All that decides the dataset's bytes."""
    kind = manifest.kind(path)
    if not path.is_file():
        raise InputError(f"manifest {path} does not exist (or is no file)")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "plan_version": VERSION,
        "manifest_sha256": digest,
        "manifest_kind": kind,
        "model": model.fingerprint,
        **asdict(settings),
    }


def digest(identity: dict) -> str:
    """The plan's id: SHA-256 (hex) of `identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def load(directory: Path) -> Plan | None:
    """The directory's plan, None where there is none.

    Raises:
      InputError: if it cannot be read, or not by this version.
    """
    path = directory / layout.PLAN / "plan.json"
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
        if said["identity"]["plan_version"] != VERSION:
            raise ValueError("another version of jaxdiff made it")
        plan = Plan(**said)
        if plan.id != digest(plan.identity):
            raise ValueError("its settings do not have its id")
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise InputError(f"{path} cannot be used ({problem}); --overwrite starts anew") from None
    return plan


def differences(old: dict, new: dict) -> str:
    """What changed from one identity to the next, on one line."""
    return ", ".join(
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def read_shard(directory: Path, shard: int) -> list[PlannedImage]:
    """The images of one shard, in the order of their keys."""
    with pq.ParquetFile(directory / layout.PLAN / "images.parquet") as file:
        table = file.read_row_group(shard).to_pylist()
    return [
        PlannedImage(request=Request(**{name: row.pop(name) for name in REQUEST_COLUMNS}), **row)
        for row in table
    ]


def make(path: Path, settings: Settings, model: Ensemble, identity: dict, folder: Path) -> Plan:
    """Plans the manifest at `path` into a new folder.

    Args:
      identity: as `identify` gives it.

    Raises:
      InputError: if the manifest cannot be read, or has no row that can be used.
    """
    folder.mkdir()
    how = {"encoding": "utf-8", "errors": "backslashreplace"}  # the path may be no UTF-8
    with (
        (folder / layout.REJECTED).open("w", **how) as rejected,
        pq.ParquetWriter(folder / "images.parquet", SCHEMA) as writer,
    ):
        reader = _Reader(path, settings, model, rejected)
        shard_sizes = []
        for shard in _shards(reader.images(), settings):
            table = pa.Table.from_pylist([image.columns() for image in shard], SCHEMA)
            writer.write_table(table, row_group_size=len(shard))
            shard_sizes.append(len(shard))
    if not shard_sizes:
        raise InputError(reader.why_nothing())
    try:
        checks.options_together(settings, reader.samplers, reader.schedulers)
    except BadValueError as problem:
        raise InputError(str(problem)) from None
    plan = Plan(
        id=digest(identity),
        identity=identity,
        manifest=str(path),
        model_name=model.name,
        rows=reader.counts,
        shard_sizes=shard_sizes,
        sha256={file.name: file_sha256(file) for file in sorted(folder.iterdir())},
    )
    (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=2) + "\n", "utf-8")
    return plan


def store(folder: Path, directory: Path) -> None:
    """Makes the plan in `folder` the directory's own; from then on it does not change."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    os.rename(folder, directory / layout.PLAN)
    layout.sync_folder(directory / layout.WORK)
    shutil.copyfile(directory / layout.PLAN / layout.REJECTED, directory / layout.REJECTED)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived_seed(job_seed: int, row_id: str, image_index: int) -> int:
    """The seed of an image whose row has none; the same wherever the row stands."""
    text = f"{job_seed}|{row_id}|{image_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class _Reader:
    """Turns a manifest into planned images, and writes down what it has to reject."""

    def __init__(self, path: Path, settings: Settings, model: Ensemble, rejected):
        self.path, self.settings, self.checkpoint = path, settings, model.base
        self.rejected = rejected
        self.checks = checks.of_request(model.base.size_multiple)
        self.schedulers = [
            checks.changed_scheduler(expert.scheduler, settings.scheduler)
            for expert in model.experts
        ]
        self.why_not = cache(partial(_why_not, schedulers=self.schedulers, eta=settings.eta))
        self.samplers: set[str] = set()
        self.counts = {"blank": 0, "rejected": 0, "accepted": 0}
        self.first_reason = ""
        self.line_of_id: dict[str, int] = {}

    def images(self) -> Iterator[PlannedImage]:
        """Yields the images in the manifest's order, `limit` of them at most."""
        index = 0
        limit = self.settings.limit or MAX_IMAGES + 1
        for line, row in self._rows():
            for image_index in range(min(row.num_images, limit - index)):
                yield self._planned(index, line, row, image_index)
                index += 1
            if index > MAX_IMAGES:
                raise InputError(f"manifest {self.path} asks for more than {MAX_IMAGES} images")
            if index == limit:
                return

    def _planned(self, index: int, line: int, row: rows.Row, image_index: int) -> PlannedImage:
        if row.seeds is None:
            seed = derived_seed(self.settings.seed, row.id, image_index)
        else:
            seed = row.seeds[image_index]
        return PlannedImage(
            key=f"{index:09d}",
            id=row.id,
            image_index=image_index,
            request=replace(row.request, seed=seed),
            metadata=row.metadata,
            line=line,
        )

    def _rows(self) -> Iterator[tuple[int, rows.Row]]:
        number = -1
        for entry in manifest.read(self.path):
            if entry.values is None and entry.error is None:
                self.counts["blank"] += 1
                continue
            number += 1
            try:
                row = self._accept(entry, number)
            except BadValueError as problem:
                self._reject(entry, str(problem))
            else:
                yield entry.line, row

    def _accept(self, entry: manifest.Entry, number: int) -> rows.Row:
        if entry.error is not None:
            raise BadValueError(entry.error)
        row = rows.parse(entry.values, number, self.settings, self.checks)
        self._check_size(row.request)
        self.samplers.add(row.request.sampler)
        if reason := self.why_not(row.request.sampler, row.request.steps):
            raise BadValueError(reason)
        first = self.line_of_id.setdefault(row.id, entry.line)
        if first != entry.line:
            is_number = " (the row's number from 0, its id unless it says another)"
            which = checks.shown(row.id) + (is_number if row.id == str(number) else "")
            raise BadValueError(f"id {which} is that of line {first} already")
        self.counts["accepted"] += 1
        return row

    def _check_size(self, request: Request) -> None:
        latents_px = request.width * request.height // self.checkpoint.size_multiple**2
        values = latents_px * self.checkpoint.latent_channels
        if self.settings.noise == "torch" and values < MIN_TORCH_VALUES:
            raise BadValueError(
                f"{request.width}x{request.height} has {values} latent values; --noise torch needs "
                f"at least {MIN_TORCH_VALUES}: make it larger"
            )

    def _reject(self, entry: manifest.Entry, reason: str) -> None:
        self.counts["rejected"] += 1
        self.first_reason = self.first_reason or f"line {entry.line}: {reason}"
        record = {"file": str(self.path), "line": entry.line, "reason": reason, "raw": entry.raw}
        self.rejected.write(json.dumps(record, ensure_ascii=False) + "\n")

    def why_nothing(self) -> str:
        if self.counts["rejected"]:
            return (
                f"manifest {self.path}: none of its {self.counts['rejected']} rows can be used; "
                f"{self.first_reason}"
            )
        return f"manifest {self.path} has no rows"


def _why_not(sampler: str, steps: int, **model) -> str:
    """What `checks.steps_of` refuses; empty if nothing. A refusal is cached, too."""
    try:
        checks.steps_of(sampler, steps, **model)
    except BadValueError as problem:
        return str(problem)
    return ""


def _shards(images: Iterator[PlannedImage], settings: Settings) -> Iterator[list[PlannedImage]]:
    """Groups images into shards of one bucket each, full batches but for a bucket's last."""
    filling: dict[Bucket, list[PlannedImage]] = {}
    for image in images:
        bucket = image.request.bucket
        shard = filling.setdefault(bucket, [])
        shard.append(image)
        if len(shard) == _shard_size(bucket, settings):
            yield filling.pop(bucket)
    yield from filling.values()


def _shard_size(bucket: Bucket, settings: Settings) -> int:
    size = settings.images_per_shard or min(
        DEFAULT_SHARD_IMAGES, DEFAULT_SHARD_PX // (bucket.width * bucket.height)
    )
    return max(1, size // settings.batch_size) * settings.batch_size
