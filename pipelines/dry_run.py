"""`jaxdiff generate --dry-run`: what a job would do. Generates nothing."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import planning
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.settings import Settings
from jaxdiff.devices import batching
from jaxdiff.families import operations
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.request import Bucket
from pipelines import inputs, slice_report
from pipelines.generate_options import Job
from pipelines.jobs import duration
from pipelines.slice_report import Counted

HEADINGS = ("size", "steps", "sampler", "guided", "images", "batches", "padded slots", "shards")
# Operations per second. The first was measured with shapes64 on two cores shared with other work.
SPEEDS = ((0.1e12, "two CPU cores"), (100e12, "a fast accelerator"))


@dataclass
class Share:
    """A bucket's share of a plan, on one device; `row` has its values of `BUCKET_COLUMNS`."""

    images: int = 0
    batches: int = 0
    slots: int = 0
    shards: int = 0
    row: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A plan that was made to be described, not to be kept.

    Attributes:
      ensemble, settings: the job's.
      plan: it.
      rows: what became of the manifest's rows, as a line of text.
      shares: each bucket's.
    """

    ensemble: Ensemble
    settings: Settings
    plan: Plan
    rows: str
    shares: dict[Bucket, Share]

    def counted(self) -> list[Counted]:
        """Returns the buckets, each with the operations of an image."""
        return [
            Counted(
                bucket,
                share.row,
                share.images,
                operations.of_image(self.ensemble, self.settings, bucket),
            )
            for bucket, share in self.shares.items()
        ]


def planned(job: Job, options: PipelineOptions) -> Planned:
    """Plans in a temporary folder.

    Args:
      options: Beam's options, which may be needed to read the manifest.

    Raises:
      InputError: in the same cases as the job itself.
    """
    ensemble = job.models.open()
    settings = job_settings.resolve(job.settings, ensemble)
    with (
        inputs.fetched(job.manifest, options) as manifest,
        tempfile.TemporaryDirectory(prefix="jaxdiff-plan-") as temporary,
    ):
        folder = Path(temporary) / "plan"
        identity = planning.identify(manifest, settings, ensemble)
        models = job.models.planned()
        plan = planning.make(
            manifest,
            settings,
            ensemble,
            identity,
            folder,
            models=models,
            image_root=job.image_root,
        )
        return Planned(ensemble, settings, plan, _rows(folder, plan), _shares(folder, plan))


def report(job: Job, options: PipelineOptions) -> str:
    """Describes what a job would do, as lines of text; the arguments are those of `planned`.

    Raises:
      InputError: as `planned` does, or if a program does not fit the job's target.
    """
    found = planned(job, options)
    plan, shares, counted = found.plan, found.shares, found.counted()
    work = sum(shares[each.bucket].slots * each.operations for each in counted)
    on_slice = []
    if job.target is not None:
        on_slice = slice_report.lines(
            job, found.settings, found.ensemble, counted, plan.shard_sizes
        )
        on_slice = ["", *on_slice]
    return "\n".join(
        [
            found.rows,
            *(f"{kind}: {text}" for kind, text in plan.notices.items()),
            f"images: {plan.images}; model: {plan.model_name}; shards: {len(plan.shard_sizes)}; "
            f"batch size: {_batch_size(plan)} per device{_may_differ(plan)}",
            "",
            *_table(shares),
            "",
            *_time(work, None if on_slice else job.price_per_chip_hour),
            *on_slice,
        ]
    )


def _rows(folder: Path, plan: Plan) -> str:
    said = ", ".join(f"{count} {what}" for what, count in plan.rows.items())
    said = f"{plan.manifest}: rows: {said}"
    if plan.rows["rejected"]:
        with (folder / plan.rejected_file).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        said += f"; first rejected: {first['file']}, line {first['line']}: {first['reason']}"
    return said


def _shares(folder: Path, plan: Plan) -> dict[Bucket, Share]:
    table = pq.read_table(folder / plan.images_file, columns=[*plans.BUCKET_COLUMNS])
    shares: dict[Bucket, Share] = {}
    batch_size, start = _batch_size(plan), 0
    for size in plan.shard_sizes:
        (row,) = table.slice(start, 1).to_pylist()
        share = shares.setdefault(plans.example(plan.models, **row).bucket, Share(row=row))
        batches = -(-size // batch_size)
        share.images += size
        share.batches += batches
        share.slots += batches * batch_size
        share.shards += 1
        start += size
    return shares


def _batch_size(plan: Plan) -> int:
    size = plan.settings.batch_size
    return batching.LEAST if size == batching.AUTO else size


def _may_differ(plan: Plan) -> str:
    if plan.settings.batch_size == batching.AUTO:
        return ", or as many as fit (a CPU uses its own)"
    return " (a CPU uses its own)"


def _table(shares: dict[Bucket, Share]) -> list[str]:
    brings = any(bucket.strength is not None or bucket.control for bucket in shares)
    rows = [(*HEADINGS, *(["begins with"] if brings else []))]
    for bucket, share in sorted(shares.items(), key=lambda item: item[0][:5]):
        rows.append(
            (
                f"{bucket.width}x{bucket.height}",
                str(bucket.steps),
                bucket.sampler,
                "yes" if bucket.guided else "no",
                str(share.images),
                str(share.batches),
                str(share.slots - share.images),
                str(share.shards),
                *([_start(bucket)] if brings else []),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _start(bucket: Bucket) -> str:
    control = ", control" if bucket.control else ""
    control += f" by {bucket.control_modes} images" if bucket.control_modes > 1 else ""
    if bucket.strength is None:
        return f"noise{control}"
    return f"{'image and mask' if bucket.masked else 'image'}, {bucket.strength:g}{control}"


def _time(work: int, price: float | None) -> list[str]:
    times = ", ".join(
        f"{duration(work / speed)} at {speed / 1e12:g} TFLOP/s ({what})" for speed, what in SPEEDS
    )
    said = [f"about {work:.1e} operations: {times}, plus loading, compilation and writing"]
    if price is not None:
        costs = ", ".join(f"{work / speed / 3600 * price:.2f} ({what})" for speed, what in SPEEDS)
        said += [f"the bill of this time, at {price:g} an hour: {costs}"]
    return said
