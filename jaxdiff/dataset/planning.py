"""From a manifest to a plan: rows checked, images numbered, shards filled. Imports no JAX."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.checkpoint.ensemble import Ensemble
from jaxdiff.checks import BadValueError
from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import manifest, rows
from jaxdiff.dataset.plan import (
    PLAN_JSON,
    SCHEMA,
    VERSION,
    Plan,
    PlannedImage,
    digest,
    read_shard,
)
from jaxdiff.dataset.settings import Settings
from jaxdiff.errors import InputError
from jaxdiff.request import Bucket, Request

MAX_IMAGES = 10**9  # keys have 9 digits
MIN_TORCH_VALUES = 16  # of one image; PyTorch draws fewer in another way
DEFAULT_SHARD_IMAGES = 1000
DEFAULT_SHARD_PX = 2**28  # 1000 images of 512x512, fewer when they are larger
# What of an identity may change when a plan is extended: whatever lets it ask for more images.
EXTENDABLE = {"manifest_sha256", "manifest_kind", "num_images", "limit"}


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


def make(
    path: Path,
    settings: Settings,
    model: Ensemble,
    identity: dict,
    folder: Path,
    *,
    models: dict[str, str | None],
    extended: tuple[Path, Plan] | None = None,
) -> Plan:
    """Plans the manifest at `path` into a new folder.

    Args:
      identity: as `identify` gives it.
      models: as in `Plan`.
      extended: a directory and its plan, whose every shard the new plan begins with.

    Raises:
      InputError: if the manifest cannot be read, has no row that can be used, or asks for less or
        for others than the plan that is to be extended.
    """
    folder.mkdir()
    plan_id = digest(identity)
    plan = Plan(plan_id, identity, str(path), model.name, models, {}, [], [], {})
    if extended:
        old = extended[1]
        plan = replace(plan, shard_sizes=[*old.shard_sizes], shard_ids=[*old.shard_ids])
    how = {"encoding": "utf-8", "errors": "backslashreplace"}  # the path may be no UTF-8
    with (
        (folder / plan.rejected_file).open("w", **how) as rejected,
        pq.ParquetWriter(folder / plan.images_file, SCHEMA) as writer,
    ):
        known = _copy_shards(*extended, writer) if extended else {}
        reader = _Reader(path, settings, model, rejected, known)
        for shard in _shards(reader.images(), settings):
            table = pa.Table.from_pylist([image.columns() for image in shard], SCHEMA)
            writer.write_table(table, row_group_size=len(shard))
            plan.shard_sizes.append(len(shard))
            plan.shard_ids.append(_shard_id(identity, table))
    if not plan.shard_sizes:
        raise InputError(reader.why_nothing())
    if known:
        row_id, index = next(iter(known))
        raise InputError(
            f"manifest {path} does not ask for image {index} of row {checks.shown(row_id)} any more"
        )
    try:
        checks.options_together(settings, reader.samplers, reader.schedulers)
    except BadValueError as problem:
        raise InputError(str(problem)) from None
    sha256 = {file.name: layout.digest(file) for file in sorted(folder.iterdir())}
    plan = replace(plan, rows=reader.counts, sha256=sha256)
    (folder / PLAN_JSON).write_text(json.dumps(asdict(plan), indent=2) + "\n", "utf-8")
    return plan


def can_extend(old: dict, new: dict) -> bool:
    """Whether a plan's identity differs from another's only in how much is asked for."""
    return all(old.get(name) == new.get(name) for name in (old.keys() | new.keys()) - EXTENDABLE)


def _copy_shards(directory: Path, old: Plan, writer: pq.ParquetWriter) -> dict:
    """Copies a plan's shards; returns the digest of each image, by its row's id and its index."""
    known = {}
    with pq.ParquetFile(directory / layout.PLAN / old.images_file) as file:
        for shard in range(file.num_row_groups):
            writer.write_table(file.read_row_group(shard))
            for image in read_shard(directory, old, shard):
                known[image.id, image.image_index] = _image_digest(image)
    return known


def _image_digest(image: PlannedImage) -> bytes:
    """Of all that decides an image's record, but for its key."""
    row = [image.id, image.image_index, asdict(image.request), image.metadata]
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).digest()


def _shard_id(identity: dict, table: pa.Table) -> str:
    """The digest of the shard's images and of all else that decides its bytes."""
    kept = {name: value for name, value in identity.items() if name not in EXTENDABLE}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    digested = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    digested.update(sink.getvalue())
    return digested.hexdigest()[:32]


def derived_seed(job_seed: int, row_id: str, image_index: int) -> int:
    """The seed of an image whose row has none; the same wherever the row stands."""
    text = f"{job_seed}|{row_id}|{image_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class _Reader:
    """Turns a manifest into planned images, and writes down what it has to reject."""

    def __init__(self, path: Path, settings: Settings, model: Ensemble, rejected, known: dict):
        self.path, self.settings, self.checkpoint = path, settings, model.base
        self.rejected = rejected
        self.known, self.next_key = known, len(known)
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
        """Yields the images that are not known yet in the manifest's order, `limit` at most."""
        index = 0
        limit = self.settings.limit or MAX_IMAGES + 1
        for line, row in self._rows():
            for image_index in range(min(row.num_images, limit - index)):
                image = self._planned(line, row, image_index)
                if not self._is_known(image):
                    yield image
                    self.next_key += 1
                index += 1
            if index > MAX_IMAGES:
                raise InputError(f"manifest {self.path} asks for more than {MAX_IMAGES} images")
            if index == limit:
                return

    def _planned(self, line: int, row: rows.Row, image_index: int) -> PlannedImage:
        if row.seeds is None:
            seed = derived_seed(self.settings.seed, row.id, image_index)
        else:
            seed = row.seeds[image_index]
        return PlannedImage(
            key=f"{self.next_key:09d}",
            id=row.id,
            image_index=image_index,
            request=replace(row.request, seed=seed),
            metadata=row.metadata,
            line=line,
        )

    def _is_known(self, image: PlannedImage) -> bool:
        """Whether the plan that is extended has the image; raises InputError if it has another."""
        digest = self.known.pop((image.id, image.image_index), None)
        if digest not in (None, _image_digest(image)):
            raise InputError(
                f"line {image.line} of manifest {self.path} asks for another image "
                f"{image.image_index} of row {checks.shown(image.id)} than before"
            )
        return digest is not None

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
