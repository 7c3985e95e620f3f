"""Plans a manifest: checks rows, numbers images and fills shards. Imports no JAX."""

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.dataset import names, paths
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.dataset.manifest.sources import Sources, root_of
from jaxdiff.dataset.plan import (
    ROW_GROUP_IMAGES,
    VERSION,
    Plan,
    PlannedImage,
    digest,
    planned_columns,
    planned_images,
)
from jaxdiff.dataset.plan_reader import PlanReader, image_digest
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.settings import Settings, written
from jaxdiff.devices import batching
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.request import (
    IMAGE_COLUMNS,
    LATER_COLUMNS,
    Bucket,
)

DEFAULT_SHARD_IMAGES = 960  # full batches for any power of two up to 64
DEFAULT_SHARD_PX = 2**28  # 1024 images of 512x512, fewer if they are larger
# Bounds of memory, which only rows with much text reach: characters of a shard's images and of all
# unfinished shards, bytes of a row group. A shard that reaches them has fewer images than usual.
MAX_SHARD_CHARACTERS = 2**26
MAX_HELD_CHARACTERS = 2**28
ROW_GROUP_BYTES = 2**26
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


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Lets Python search for cycles of objects more rarely: rows are many objects, but no cycles.

    It took a seventh of the time. Unlike without any search, memory stays bounded.
    """
    usual = gc.get_threshold()
    gc.set_threshold(usual[0] and 50_000, *usual[1:])  # 0 turns it off
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@_rarely_collected()
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
    # A name might not be UTF-8.
    model_name = os.fsencode(model.name).decode("utf-8", "backslashreplace")
    # While it is written, the plan has columns for images, in case that a row has one.
    plan = Plan(
        plan_id,
        *(identity, manifest.name, model_name, models, {}, [], [], {}),
        counts_tokens=True,
        record_version=2,
        takes_images=True,
        image_root=root,
        later_columns=LATER_COLUMNS,
    )
    if extended:
        old = extended.plan
        shards = {"shard_sizes": [*old.shard_sizes], "shard_ids": [*old.shard_ids]}
        kept = ("model_name", "counts_tokens", "record_version")
        plan = replace(plan, **shards, **{name: getattr(old, name) for name in kept})
    how = {"encoding": "utf-8", "errors": "backslashreplace"}  # the path might not be UTF-8
    with (
        (folder / plan.rejected_file).open("w", **how) as rejected,
        pq.ParquetWriter(folder / plan.images_file, plan.schema, write_statistics=False) as writer,
    ):
        known = _copy_shards(extended, writer) if extended else {}
        reader = PlanReader(manifest, settings, model, rejected, known, Sources(root))
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
        upscales=model.upscales,
        later_columns=sorted(reader.later_columns),
    )
    sha256 = {file.name: paths.digest(file) for file in sorted(folder.iterdir())}
    plan = replace(plan, rows=reader.counts, sha256=sha256, notices=reader.notices.texts())
    (folder / names.PLAN_JSON).write_text(json.dumps(asdict(plan), indent=2) + "\n", "utf-8")
    return plan


def _check(manifest: Manifest, settings: Settings, plan: Plan, reader: PlanReader) -> None:
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
                known[image.id, image.image_index] = image_digest(image)
    return known


def _table(images: list[PlannedImage], schema: pa.Schema) -> pa.Table:
    """Returns a shard's images as rows of the plan."""
    columns = planned_columns(images)
    return pa.table([pa.array(columns[each.name], each.type) for each in schema], schema=schema)


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


def _shards(images: Iterator[PlannedImage], settings: Settings) -> Iterator[list[PlannedImage]]:
    """Groups images into shards of one bucket; all batches but a bucket's last are full.

    An unfinished shard is also yielded before its text, or that of all of them, fills the memory.
    """
    filling: dict[Bucket, _Unfinished] = {}
    held = 0
    for image in images:
        bucket = image.request.bucket
        shard = filling.get(bucket)
        if shard is None:
            shard = filling[bucket] = _Unfinished(_shard_size(bucket, settings))
        shard.images.append(image)
        size = _characters(image)
        shard.characters += size
        held += size
        if len(shard.images) == shard.full_size:
            finished = bucket
        elif held >= MAX_HELD_CHARACTERS:
            finished = max(filling, key=lambda each: filling[each].characters)
        elif shard.characters >= MAX_SHARD_CHARACTERS:
            finished = bucket
        else:
            continue
        held -= filling[finished].characters
        yield filling.pop(finished).images
    yield from (shard.images for shard in filling.values())


class _Unfinished:
    """The images of a shard so far, and their characters."""

    def __init__(self, full_size: int):
        self.full_size, self.images, self.characters = full_size, [], 0


def _characters(image: PlannedImage) -> int:
    """Returns the characters of an image's texts in the plan."""
    prompts = len(image.request.prompt) + len(image.request.negative_prompt)
    return prompts + len(image.id) + len(image.metadata) + len(image.source)


def _shard_size(bucket: Bucket, settings: Settings) -> int:
    size = settings.images_per_shard or min(
        DEFAULT_SHARD_IMAGES, DEFAULT_SHARD_PX // (bucket.width * bucket.height)
    )
    return batching.full(size, settings.batch_size)
