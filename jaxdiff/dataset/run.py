"""A run: a plan and the store of its dataset."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff.dataset import formats, names
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset.plan import Plan, PlannedImage
from jaxdiff.dataset.store import Store, open_store
from jaxdiff.errors import InputError
from jaxdiff.request import Request


@dataclass(frozen=True)
class Run:
    """A plan and the store of its dataset."""

    store: Store
    plan: Plan

    @property
    def address(self) -> str:
        """The directory of the dataset, or its address."""
        return self.store.address

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(len(self.plan.shard_sizes))

    def images_name(self, shard: int) -> str:
        """Returns the name of a shard's image file or folder; in a bucket, with a hash in it."""
        ending = formats.FORMATS[self.plan.settings.format].ending
        return f"{names.DATA}/train-{shard:05d}{'.' * bool(ending)}{ending}"

    def metadata_name(self, shard: int) -> str:
        """Returns the name of a shard's metadata file; in a bucket, with a hash in it."""
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
        with self.open_images() as file:
            while start >= (rows := file.metadata.row_group(group).num_rows):
                start, group = start - rows, group + 1
            return plans.planned_images(file.read_row_group(group).slice(start, sizes[shard]))

    def kinds(self) -> dict[Request, int]:
        """Returns a request with an empty prompt for each bucket, and its number of images."""
        counts: Counter[Request] = Counter()
        with self.open_images() as file:
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

    @contextlib.contextmanager
    def open_images(self) -> Iterator[pq.ParquetFile]:
        """Opens the file that lists the planned images."""
        with (
            self.store.open(f"{names.PLAN}/{self.plan.images_file}") as file,
            pq.ParquetFile(file) as images,
        ):
            yield images

    def rejected(self) -> str:
        """Returns the lines of the plan's file of rejected rows."""
        return self.store.read(f"{names.PLAN}/{self.plan.rejected_file}").decode()

    def snapshot(self) -> "Run":
        """Returns the run with its store's `snapshot`."""
        return Run(self.store.snapshot(), self.plan)

    def tidy(self) -> None:
        """Deletes the files of earlier plans that this plan extends."""
        for name in self.store.entries(names.PLAN):
            is_plans = re.fullmatch(r"(images|rejected)-[0-9a-f]{16}\.[a-z]+", name)
            if is_plans and name not in self.plan.sha256:
                self.store.delete(f"{names.PLAN}/{name}")


def _with_column(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def begin(folder: Path, store: Store, extended: Run | None = None) -> Run:
    """Makes a plan in a local folder the plan of a dataset; returns its run.

    The plan is valid once its `plan.json` is in place. In a bucket, another process may have been
    first: then that plan stays, and is the one returned.

    Args:
      extended: the run that the plan extends.

    Raises:
      InputError: if another process has extended that run.
    """
    store.begin(folder, extended and extended.plan.id)
    run = open_run(store)
    store.swap(names.REJECTED, run.rejected())
    return run


def find(where: str | Path | Store) -> Run | None:
    """Returns the run in a directory, at an address or in a store, or None if there is none.

    Raises:
      InputError: if its plan cannot be read by this version.
    """
    store = open_store(where) if isinstance(where, str | Path) else where
    plan = plans.load(store)
    return plan and Run(store, plan)


def open_run(where: str | Path | Store) -> Run:
    """Returns a run like `find`, but raises InputError if there is none."""
    run = find(where)
    if run is None:
        address = where if isinstance(where, str | Path) else where.address
        raise InputError(f"{address} holds no jaxdiff run")
    return run
