"""Plans a manifest: checks rows, numbers images and fills shards. Imports no JAX."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.dataset import names, paths
from jaxdiff.dataset.manifest import columns, rows
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.dataset.manifest.notices import Notices
from jaxdiff.dataset.manifest.readers import Entry
from jaxdiff.dataset.manifest.sources import Sources, root_of
from jaxdiff.dataset.plan import (
    ROW_GROUP_IMAGES,
    VERSION,
    Plan,
    PlannedImage,
    digest,
    planned_images,
)
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.settings import Settings, written
from jaxdiff.devices import batching
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.images import loading
from jaxdiff.request import (
    IMAGE_COLUMNS,
    LATER_COLUMNS,
    SOURCES,
    Bucket,
    Request,
    field_checks,
)

MAX_IMAGES = 10**9  # keys have 9 digits
MIN_TORCH_VALUES = 16  # per image; PyTorch draws fewer values with another algorithm
DEFAULT_SHARD_IMAGES = 960  # full batches for any power of two up to 64
DEFAULT_SHARD_PX = 2**28  # 1024 images of 512x512, fewer if they are larger
# Bounds of memory, which only rows with much text reach: characters of a shard's images and of all
# unfinished shards, bytes of a row group. A shard that reaches them has fewer images than usual.
MAX_SHARD_CHARACTERS = 2**26
MAX_HELD_CHARACTERS = 2**28
ROW_GROUP_BYTES = 2**26
MAX_REJECTED = 1_000_000  # rows; a manifest with more is another kind of file
# The parts of an identity that may change when a plan is extended, because they add images.
EXTENDABLE = {"manifest_sha256", "manifest_kind", "num_images", "limit"}


def identify(manifest: Manifest, settings: Settings, model: Ensemble) -> dict:
    """Returns what determines the dataset's bytes; raises OSError for an unreadable manifest."""
    return {
        "plan_version": VERSION,
        "manifest_sha256": manifests.digest(manifest),
        "manifest_kind": manifests.kinds(manifest),
        "model": model.fingerprint,
        **written(settings),
    }


def make(
    manifest: Manifest,
    settings: Settings,
    model: Ensemble,
    identity: dict,
    folder: Path,
    *,
    models: dict[str, str | Sequence[str] | None],
    image_root: str | None = None,
    extended: Run | None = None,
) -> Plan:
    """Plans a manifest into a new folder; the manifest is not needed afterwards.

    Args:
      identity: as `identify` returns it.
      models: as in `Plan`.
      image_root: as in `Plan`; None for the manifest's folder.
      extended: the run to extend; the new plan begins with all its shards.

    Raises:
      InputError: if the manifest cannot be read, changes meanwhile, has no usable row, or does not
        ask for all images of the run to extend.
    """
    folder.mkdir()
    plan_id = digest(identity)
    root = image_root or root_of(manifest)
    # While it is written, the plan has columns for images, in case that a row has one.
    plan = Plan(
        plan_id,
        *(identity, manifest.name, model.name, models, {}, [], [], {}),
        counts_tokens=True,
        takes_images=True,
        image_root=root,
        later_columns=LATER_COLUMNS,
    )
    if extended:
        old = extended.plan
        shards = {"shard_sizes": [*old.shard_sizes], "shard_ids": [*old.shard_ids]}
        plan = replace(plan, counts_tokens=old.counts_tokens, **shards)
    how = {"encoding": "utf-8", "errors": "backslashreplace"}  # the path might not be UTF-8
    with (
        (folder / plan.rejected_file).open("w", **how) as rejected,
        pq.ParquetWriter(folder / plan.images_file, plan.schema, write_statistics=False) as writer,
    ):
        known = _copy_shards(extended, writer) if extended else {}
        reader = _Reader(manifest, settings, model, rejected, known, Sources(root))
        tables = (_table(images, plan.schema) for images in _shards(reader.images(), settings))
        for table in _row_groups(_noted(tables, plan)):
            writer.write_table(table, row_group_size=len(table))
    _check(manifest, settings, plan, reader)
    takes_images = reader.takes_images or (extended is not None and extended.plan.takes_images)
    if extended and takes_images and not extended.plan.takes_images:
        raise InputError(
            f"manifest {manifest.name} has images, but the dataset to extend has rows without "
            "images only; choose another --output"
        )
    plan = replace(
        plan,
        takes_images=takes_images,
        image_root=root if takes_images else "",
        enlarges=model.enlarges or 1,
        upscales=model.upscaler.factor if model.samples and model.upscaler else None,
        later_columns=sorted(reader.later_columns),
    )
    sha256 = {file.name: paths.digest(file) for file in sorted(folder.iterdir())}
    plan = replace(plan, rows=reader.counts, sha256=sha256, notices=reader.notices.texts())
    (folder / names.PLAN_JSON).write_text(json.dumps(asdict(plan), indent=2) + "\n", "utf-8")
    return plan


def _check(manifest: Manifest, settings: Settings, plan: Plan, reader: "_Reader") -> None:
    """Raises InputError if a manifest, once it is read, cannot be planned."""
    if manifests.digest(manifest) != plan.identity["manifest_sha256"]:
        raise InputError(
            f"manifest {manifest.name} changed while it was read; run the command again"
        )
    if not plan.shard_sizes:
        raise InputError(reader.why_nothing())
    if reader.known:
        row_id, index = next(iter(reader.known))
        raise InputError(
            f"manifest {manifest.name} no longer asks for image {index} of row "
            f"{checks.shown(row_id)}"
        )
    try:
        scheduler_config.check_options(settings, reader.samplers, reader.schedulers)
    except BadValueError as problem:
        raise InputError(str(problem)) from None


def can_extend(old: dict, new: dict) -> bool:
    """Returns whether two plan identities differ only in how many images they ask for."""
    return all(old.get(name) == new.get(name) for name in (old.keys() | new.keys()) - EXTENDABLE)


def _copy_shards(run: Run, writer: pq.ParquetWriter) -> dict:
    """Copies a plan's shards; returns the digest of each image by row id and image index."""
    known = {}
    with run.open_images() as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            writer.write_table(_widened(table, writer.schema), row_group_size=len(table))
            for image in planned_images(table):
                known[image.id, image.image_index] = _image_digest(image)
    return known


def _image_digest(image: PlannedImage) -> bytes:
    """Returns the digest of an image's record without its key; valid in this process only."""
    decides = (image.id, image.image_index, image.request, image.metadata)
    return hashlib.blake2b(repr(decides).encode(), digest_size=16).digest()


def _table(images: list[PlannedImage], schema: pa.Schema) -> pa.Table:
    """Returns a shard's images as rows of the plan."""
    rows = [image.columns() for image in images]
    return pa.table({name: [row[name] for row in rows] for name in schema.names}, schema)


def _widened(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns a table of an earlier version with all columns of a plan."""
    return pa.concat_tables([table, schema.empty_table()], promote_options="default").select(
        schema.names
    )


def _noted(shards: Iterable[pa.Table], plan: Plan) -> Iterator[pa.Table]:
    """Yields each shard after adding its size and id to the plan."""
    for table in shards:
        plan.shard_sizes.append(len(table))
        plan.shard_ids.append(_shard_id(plan.identity, table))
        yield table


def _row_groups(shards: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Combines whole shards into row groups of `ROW_GROUP_IMAGES` or `ROW_GROUP_BYTES`."""
    group, images, size = [], 0, 0
    for table in shards:
        group.append(table)
        images += len(table)
        size += table.nbytes
        if images >= ROW_GROUP_IMAGES or size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(group)
            group, images, size = [], 0, 0
    if group:
        yield pa.concat_tables(group)


def _shard_id(identity: dict, table: pa.Table) -> str:
    """Returns the digest of the shard's images and all else that determines its bytes."""
    kept = {name: value for name, value in identity.items() if name not in EXTENDABLE}
    unused = [name for name in IMAGE_COLUMNS if table[name].null_count == len(table)]
    # A shard of an earlier version has no such columns.
    table = table.drop_columns(["source", "line", *unused])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    digested = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    digested.update(sink.getvalue())
    return digested.hexdigest()[:32]


def derived_seed(job_seed: int, row_id: str, image_index: int) -> int:
    """Returns the seed of an image whose row has none, independent of the row's position."""
    text = f"{job_seed}|{row_id}|{image_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class _Reader:
    """Turns a manifest into planned images and lists the rows that it rejects."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        model: Ensemble,
        rejected,
        known: dict,
        sources: Sources,
    ):
        self.manifest, self.settings, self.defaults = manifest, settings, model.base.defaults
        self.rejected, self.sources, self.takes_images = rejected, sources, False
        self.later_columns: set[str] = set()
        self.with_images = partial(model.with_images, strength=settings.strength)
        self.known, self.next_key = known, len(known)
        defaults = model.base.defaults
        self.enlarges = model.enlarges
        sides = defaults.size_multiple, defaults.largest_side
        self.checks = field_checks(*sides, model.samplers)
        self.schedulers = model.schedulers(settings.scheduler)
        self.why_not = cache(partial(_why_not, schedulers=self.schedulers, eta=settings.eta))
        self.lost_tokens = model.lost_tokens(settings.prompt_chunks)
        self.notices = Notices(settings.prompt_column, model.base.defaults.guidance)
        self.samplers: set[str] = set()
        self.counts = {"blank": 0, "rejected": 0, "accepted": 0}
        self.first_reason = ""
        self.place_of_id: dict[str, tuple[str, int]] = {}
        self.prompt_of_item: dict[str, str] = {}  # of manifests with one row per question

    def images(self) -> Iterator[PlannedImage]:
        """Yields the images of the first `limit` that are not planned yet, in manifest order."""
        index = 0
        limit = self.settings.limit or MAX_IMAGES + 1
        for place, row, lost in self._rows():
            for image_index in range(min(row.num_images, limit - index)):
                image = self._planned(place, row, image_index, lost)
                if not self.known or not self._is_known(image):
                    yield image
                    self.next_key += 1
                index += 1
            if index > MAX_IMAGES:
                raise InputError(
                    f"manifest {self.manifest.name} asks for more than {MAX_IMAGES} images"
                )
            if index == limit:
                return

    def _planned(
        self, place: tuple[str, int], row: rows.Row, image_index: int, lost: int
    ) -> PlannedImage:
        if row.seeds is None:
            seed = derived_seed(self.settings.seed, row.id, image_index)
        else:
            seed = row.seeds[image_index]
        request = replace(row.request, seed=seed)
        return PlannedImage(
            f"{self.next_key:09d}", row.id, image_index, request, row.metadata, *place, lost
        )

    def _is_known(self, image: PlannedImage) -> bool:
        """Returns whether the extended plan has the image; raises InputError if it differs."""
        digest = self.known.pop((image.id, image.image_index), None)
        if digest not in (None, _image_digest(image)):
            raise InputError(
                f"line {image.line} of manifest {image.source} changes image "
                f"{image.image_index} of row {checks.shown(image.id)}, which is already planned"
            )
        return digest is not None

    def _rows(self) -> Iterator[tuple[tuple[str, int], rows.Row, int]]:
        """Yields accepted rows: their place (file and line), the row, its number of lost tokens."""
        number = -1
        for source in self.manifest.sources:
            # A name might not be UTF-8.
            name = os.fsencode(source.name).decode("utf-8", "backslashreplace")
            arguments = source, self.settings.prompt_column, self.sources.root
            for entry in manifests.read(*arguments):
                if entry.values is None and entry.error is None:
                    self.counts["blank"] += 1
                    continue
                number += 1
                place = (name, entry.line)
                try:
                    row = self._accept(entry, place, number)
                except BadValueError as problem:
                    self._reject(entry, place, str(problem))
                else:
                    self.counts["blank" if row is None else "accepted"] += 1
                    if row is not None:
                        prompts = (row.request.prompt, row.request.negative_prompt)
                        lost = sum(map(self.lost_tokens, prompts))
                        self.notices.add(place, entry.values, row.request, lost)
                        yield place, row, lost

    def _accept(self, entry: Entry, place: tuple[str, int], number: int) -> rows.Row | None:
        """Returns the row, or None if it repeats the item of an accepted row."""
        if entry.error is not None:
            raise BadValueError(entry.error)
        needs_prompt = self.enlarges is None
        row = rows.parse(entry.values, number, self.settings, self.checks, needs_prompt)
        request = row.request
        if not needs_prompt:
            request = self._sized(request)
        self._check_size(request)
        self.samplers.add(request.sampler)
        if reason := self.why_not(request.sampler, request.steps):
            raise BadValueError(reason)
        request = self.sources.pinned(self.with_images(request))
        row = replace(row, request=request)
        self.takes_images |= any(getattr(request, name) is not None for name in SOURCES)
        has = (name for name in LATER_COLUMNS if getattr(request, name) is not None)
        self.later_columns.update(has)
        first = self.place_of_id.setdefault(row.id, place)
        if columns.has_repeated_items(entry.values):
            said = self.prompt_of_item.setdefault(row.id, request.prompt)
            if first is not place and said == request.prompt:
                return None
        if first is not place:
            raise BadValueError(self._why_not_again(row.id, number, first, place))
        return row

    def _why_not_again(self, row_id: str, number: int, first: tuple, place: tuple) -> str:
        is_number = " (the row's number from 0, which is its default id)"
        which = checks.shown(row_id) + (is_number if row_id == str(number) else "")
        where = f" of {first[0]}" if first[0] != place[0] else ""
        return f"id {which} is already used on line {first[1]}{where}"

    def _sized(self, request: Request) -> Request:
        """Returns a request with the size of its image, enlarged."""
        if request.image is None:  # which `with_images` rejects
            return request
        size = self.sources.size(request)
        multiple = self.defaults.size_multiple
        sides = loading.enlarged_size(*size, self.enlarges, multiple)
        for name, side in zip(("height", "width"), sides, strict=True):
            most = self.defaults.largest_side
            if side > most:
                raise BadValueError(
                    f"image is {size[1]}x{size[0]}: enlarged by {self.enlarges}, its {name} would "
                    f"be {side} px, more than {most}; make it smaller"
                )
        return replace(request, height=sides[0], width=sides[1])

    def _check_size(self, request: Request) -> None:
        latents_px = request.width * request.height // self.defaults.factor**2
        values = latents_px * self.defaults.latent_channels
        if self.settings.noise == "torch" and values < MIN_TORCH_VALUES:
            raise BadValueError(
                f"{request.width}x{request.height} has {values} latent values; --noise torch needs "
                f"at least {MIN_TORCH_VALUES}: make it larger"
            )

    def _reject(self, entry: Entry, place: tuple[str, int], reason: str) -> None:
        source, line = place
        self.counts["rejected"] += 1
        if not self.first_reason:
            where = f"{source}, " if len(self.manifest.sources) > 1 else ""
            self.first_reason = f"{where}line {line}: {reason}"
        record = {"file": source, "line": line, "reason": reason, "raw": entry.raw}
        self.rejected.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.counts["rejected"] > MAX_REJECTED:
            raise InputError(
                f"manifest {self.manifest.name} has more than {MAX_REJECTED} rows that cannot be "
                f"used; {self.first_reason}"
            )

    def why_nothing(self) -> str:
        if self.counts["rejected"]:
            return (
                f"manifest {self.manifest.name}: none of its {self.counts['rejected']} rows can be "
                f"used; {self.first_reason}"
            )
        return f"manifest {self.manifest.name} has no rows"


def _why_not(sampler: str, steps: int, **model) -> str:
    """Returns the error message of `check_steps`, or ""; unlike an error, it can be cached."""
    try:
        scheduler_config.check_steps(sampler, steps, **model)
    except BadValueError as problem:
        return str(problem)
    return ""


def _shards(images: Iterator[PlannedImage], settings: Settings) -> Iterator[list[PlannedImage]]:
    """Groups images into shards of one bucket; all batches but a bucket's last are full.

    An unfinished shard is also yielded before its text, or that of all of them, fills the memory.
    """
    filling: dict[Bucket, list[PlannedImage]] = {}
    characters: Counter[Bucket] = Counter()
    held = 0
    for image in images:
        bucket = image.request.bucket
        shard = filling.setdefault(bucket, [])
        shard.append(image)
        characters[bucket] += (size := _characters(image))
        held += size
        is_full = len(shard) == _shard_size(bucket, settings)
        if not is_full and held >= MAX_HELD_CHARACTERS:
            bucket, is_full = max(characters, key=characters.get), True
        if is_full or characters[bucket] >= MAX_SHARD_CHARACTERS:
            held -= characters.pop(bucket)
            yield filling.pop(bucket)
    yield from filling.values()


def _characters(image: PlannedImage) -> int:
    """Returns the characters of an image's texts in the plan."""
    texts = (image.id, image.metadata, image.request.prompt, image.request.negative_prompt)
    return sum(map(len, texts)) + len(image.source)


def _shard_size(bucket: Bucket, settings: Settings) -> int:
    size = settings.images_per_shard or min(
        DEFAULT_SHARD_IMAGES, DEFAULT_SHARD_PX // (bucket.width * bucket.height)
    )
    return batching.full(size, settings.batch_size)
