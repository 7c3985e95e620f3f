"""A run: a plan and the store of its dataset."""

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff.dataset import formats, names, paths
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.plan import PLAN_JSON, Plan, PlannedImage
from jaxdiff.errors import InputError
from jaxdiff.request import Request


@dataclass(frozen=True)
class Run:
    """A plan and the store of its dataset."""

    store: LocalStore
    plan: Plan

    @property
    def directory(self) -> Path:
        """The directory of the dataset."""
        return self.store.root

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(len(self.plan.shard_sizes))

    def images_name(self, shard: int) -> str:
        """Returns the name of a shard's image file or folder."""
        ending = formats.FORMATS[self.plan.settings.format].ending
        return f"{names.DATA}/train-{shard:05d}{'.' * bool(ending)}{ending}"

    def metadata_name(self, shard: int) -> str:
        """Returns the name of a shard's metadata file."""
        return f"{names.METADATA}/train-{shard:05d}.parquet"

    def file_names(self, shard: int) -> tuple[str, str]:
        """Returns the names of a shard's images and of its metadata."""
        return self.images_name(shard), self.metadata_name(shard)

    def is_folder(self, name: str) -> bool:
        """Returns whether a shard's images or metadata are a folder instead of a file."""
        ending = formats.FORMATS[self.plan.settings.format].ending
        return not ending and name.startswith(f"{names.DATA}/")

    def planned(self, shard: int) -> list[PlannedImage]:
        """Returns the images of a shard, in the order of their keys."""
        sizes = self.plan.shard_sizes
        start, group = sum(sizes[:shard]), 0  # `start` is relative to the row group
        with pq.ParquetFile(self.images_file) as file:
            while start >= (rows := file.metadata.row_group(group).num_rows):
                start, group = start - rows, group + 1
            return plans.planned_images(file.read_row_group(group).slice(start, sizes[shard]))

    def kinds(self) -> dict[Request, int]:
        """Returns a request with an empty prompt for each bucket, and its number of images."""
        counts: Counter[Request] = Counter()
        with pq.ParquetFile(self.images_file) as file:
            columns = [name for name in plans.BUCKET_COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                part = pa.Table.from_batches([batch])
                guided = pc.if_else(pc.greater(part["guidance_scale"], 1.0), 2.0, 1.0)
                part = _with_column(part, "guidance_scale", guided)
                for name in {"mask_image", "outpaint"} & {*columns}:
                    part = _with_column(part, name, pc.if_else(part[name].is_valid(), "", None))
                groups = part.group_by(part.column_names).aggregate([([], "count_all")])
                for row in groups.to_pylist():
                    count = row.pop("count_all")
                    counts[plans.example(self.plan.models, **row)] += count
        return dict(counts.most_common())

    @property
    def images_file(self) -> Path:
        """The path of the file that lists the planned images."""
        return self.store.path(f"{names.PLAN}/{self.plan.images_file}")

    def tidy(self) -> None:
        """Deletes the files of earlier plans that this plan extends."""
        for path in self.store.path(names.PLAN).iterdir():
            is_plans = re.fullmatch(r"(images|rejected)-[0-9a-f]{16}\.[a-z]+", path.name)
            if is_plans and path.name not in self.plan.sha256:
                path.unlink()


def _with_column(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def begin(folder: Path, store: LocalStore) -> Run:
    """Moves a plan from a folder into the dataset, replacing the plan that it extends, if any.

    The plan is valid once its `plan.json` is in place; a kill leaves the old plan or the new.
    """
    for path in folder.iterdir():
        paths.sync(path)
    target = store.path(names.PLAN)
    if not target.exists():
        os.rename(folder, target)
        paths.sync_names(store.path(names.WORK))
    else:
        store.path(names.SUCCESS).unlink(missing_ok=True)  # it belongs to the old plan
        for path in sorted(folder.iterdir(), key=lambda path: path.name == PLAN_JSON):
            os.replace(path, target / path.name)  # plan.json last
            paths.sync_names(target)
    run = open_run(store.root)
    shutil.copyfile(target / run.plan.rejected_file, store.path(names.REJECTED))
    return run


def find(directory: Path) -> Run | None:
    """Returns the run in a directory, or None if there is none.

    Raises:
      InputError: if its plan cannot be read by this version.
    """
    store = LocalStore(directory)
    plan = plans.load(store)
    return plan and Run(store, plan)


def open_run(directory: Path) -> Run:
    """Returns the run in a directory like `find`, but raises InputError if there is none."""
    run = find(directory)
    if run is None:
        raise InputError(f"{directory} holds no jaxdiff run")
    return run
