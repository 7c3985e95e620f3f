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
from jaxdiff.devices import batching
from jaxdiff.families import operations
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


def report(job: Job, options: PipelineOptions) -> str:
    """Plans in a temporary folder and describes the plan, as lines of text.

    Args:
      options: Beam's options, which may be needed to read the manifest.

    Raises:
      InputError: in the same cases as the job itself.
    """
    ensemble = job.models.open()
    settings = job_settings.resolve(job.settings, ensemble)
    with (
        inputs.fetched(job.manifest, options, job.prompts) as manifest,
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
        shares = _shares(folder, plan)
        rows = _rows(folder, plan)
    of_image = {bucket: operations.of_image(ensemble, settings, bucket) for bucket in shares}
    work = sum(share.slots * of_image[bucket] for bucket, share in shares.items())
    on_slice = []
    if job.target is not None:
        counted = [
            Counted(bucket, share.row, share.images, of_image[bucket])
            for bucket, share in shares.items()
        ]
        on_slice = ["", *slice_report.lines(job, settings, ensemble, counted, plan.shard_sizes)]
    return "\n".join(
        [
            rows,
            *(f"{kind}: {text}" for kind, text in plan.notices.items()),
            f"images: {plan.images}; model: {plan.model_name}; shards: {len(plan.shard_sizes)}; "
            f"batch size: {_batch_size(plan)} per device{_may_differ(plan)}",
            "",
            *_table(shares),
            "",
            _time(work),
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


def _time(work: int) -> str:
    times = ", ".join(
        f"{duration(work / speed)} at {speed / 1e12:g} TFLOP/s ({what})" for speed, what in SPEEDS
    )
    return f"about {work:.1e} operations: {times}, plus loading, compilation and writing"
