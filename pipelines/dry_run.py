"""`jaxdiff generate --dry-run`: what a job would do. Keeps no image."""

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import planning
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.settings import Settings
from jaxdiff.dataset.store import open_store
from jaxdiff.devices import batching
from jaxdiff.families import operations
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.request import Bucket
from pipelines import inputs, jobs, slice_report, supervisor
from pipelines.generate_options import Job
from pipelines.jobs import count, duration
from pipelines.slice_report import Counted
from pipelines.worker import Task

HEADINGS = ("size", "steps", "sampler", "guided", "images", "batches", "padded slots", "shards")
# Operations per second. The first was measured with shapes64 on two cores shared with other work.
SPEEDS = ((0.1e12, "two CPU cores"), (100e12, "a fast accelerator"))
# Bytes of a photograph for each pixel, and of an image's record and of its place in a shard.
PIXEL_BYTES = {"png": 1.8, "webp": 1.3, "jpeg": 0.6}
RECORD_BYTES = {"webdataset": 4000, "parquet": 1000, "imagefolder": 1500}


@dataclass
class Share:
    """A bucket's share of a plan, on one device.

    Attributes:
      row: its values of `BUCKET_COLUMNS`.
      shards: the sizes of its shards; `first` is the number of the first of them.
    """

    row: dict
    first: int
    batch_size: int
    shards: list[int] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of its images."""
        return sum(self.shards)

    @property
    def batches(self) -> int:
        """The number of batches, of which each shard's last may be padded."""
        return sum(-(-size // self.batch_size) for size in self.shards)

    @property
    def slots(self) -> int:
        """The number of images with the padding."""
        return self.batches * self.batch_size


@dataclass(frozen=True)
class Planned:
    """A plan that was made to be described, not to be kept.

    Attributes:
      ensemble, settings: the job's.
      plan: it.
      rows: what became of the manifest's rows, as a line of text.
      shares: each bucket's.
      measured: a bucket, and what a worker measured of its first shard; None if none did.
    """

    ensemble: Ensemble
    settings: Settings
    plan: Plan
    rows: str
    shares: dict[Bucket, Share]
    measured: tuple[Bucket, dict] | None = None

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

    def work(self) -> dict[Bucket, int]:
        """Returns the operations of each bucket, with those of the padding."""
        return {
            each.bucket: self.shares[each.bucket].slots * each.operations for each in self.counted()
        }


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
        inputs.fetched(job.manifest, options, prompts=job.prompts) as manifest,
        tempfile.TemporaryDirectory(prefix="jaxdiff-plan-") as temporary,
    ):
        store = open_store(temporary)
        folder = store.scratch("plan")
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
        found = Planned(ensemble, settings, plan, _rows(folder, plan), _shares(folder, plan))
        if not job.measure:
            return found
        work = found.work()
        largest = max(work, key=work.get)
        run = runs.begin(folder, store)
        return replace(found, measured=(largest, _measured(job, run, found.shares[largest].first)))


def report(job: Job, options: PipelineOptions) -> str:
    """Describes what a job would do, as lines of text; the arguments are those of `planned`.

    Raises:
      InputError: as `planned` does, or if a program does not fit the job's target.
      WorkerError: if the worker that measures fails.
    """
    found = planned(job, options)
    plan, shares = found.plan, found.shares
    on_slice = []
    if job.target is not None:
        on_slice = slice_report.lines(
            job, found.settings, found.ensemble, found.counted(), plan.shard_sizes
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
            *_time(job, found),
            _space(found),
            *on_slice,
        ]
    )


def _rows(folder: Path, plan: Plan) -> str:
    said = f"{plan.manifest}: {jobs.rows(plan.rows)}"
    if plan.rows["rejected"]:
        with (folder / plan.rejected_file).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        said += f"; first rejected: {first['file']}, line {first['line']}: {first['reason']}"
    return said


def _shares(folder: Path, plan: Plan) -> dict[Bucket, Share]:
    table = pq.read_table(folder / plan.images_file, columns=[*plans.BUCKET_COLUMNS])
    shares: dict[Bucket, Share] = {}
    batch_size, start = _batch_size(plan), 0
    for number, size in enumerate(plan.shard_sizes):
        (row,) = table.slice(start, 1).to_pylist()
        bucket = plans.example(plan.models, **row).bucket
        shares.setdefault(bucket, Share(row, number, batch_size)).shards.append(size)
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
                str(len(share.shards)),
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


def _measured(job: Job, run: Run, shard: int) -> dict:
    """Times two batches of a shard in a worker; returns what `worker.make_shard` does."""
    task = Task(run.address, vars(job.models.anywhere()), shard, "measure")
    with supervisor.closed_afterwards():
        return supervisor.make_shard(task, job.workers)


def _time(job: Job, found: Planned) -> list[str]:
    """Returns how long the job takes and what that costs, as measured here or by nominal speeds."""
    work, price = sum(found.work().values()), job.price_per_chip_hour
    if found.measured is None:
        seconds = {what: work / speed for speed, what in SPEEDS}
        times = ", ".join(
            f"{duration(work / speed)} at {speed / 1e12:g} TFLOP/s ({what})"
            for speed, what in SPEEDS
        )
        said = [
            f"time: about {work:.1e} operations: {times}, plus loading, compilation and writing; "
            "--measure times two batches here"
        ]
    else:
        seconds, said = _measured_time(job, found)
    if price is None or job.target is not None:  # whose bill follows
        return said
    costs = ", ".join(f"{each / 3600 * price:.2f} ({what})" for what, each in seconds.items())
    return [*said, f"the bill of this time, at {price:g} an hour: {costs}"]


def _measured_time(job: Job, found: Planned) -> tuple[dict[str, float], list[str]]:
    """Returns the devices' seconds, and lines about them; other buckets' are by operations."""
    bucket, facts = found.measured
    of_image = {each.bucket: each.operations for each in found.counted()}
    slots, each_batch = facts["slots"], facts["seconds"]
    busy = sum(
        replace(share, batch_size=slots).batches * each_batch * of_image[each] / of_image[bucket]
        for each, share in found.shares.items()
    )
    workers = job.workers.count
    devices = 1 if "cpu" in facts["device"] else workers
    whole = facts["startup"] + busy / devices
    return {facts["device"]: whole * devices}, [
        f"measured on {facts['device']}: {count(slots, 'image')} of {bucket.width}x"
        f"{bucket.height} in {duration(each_batch)}, after loading and compiling in "
        f"{duration(facts['startup'])}",
        f"time: about {duration(whole)} with {count(workers, 'worker')}",
    ]


def _space(found: Planned) -> str:
    plan, settings = found.plan, found.settings
    if found.measured is not None:
        image_bytes, known = found.measured[1]["bytes"], "like the measured images"
    else:
        pixels = sum(
            share.images * bucket.width * bucket.height for bucket, share in found.shares.items()
        )
        pixels *= (plan.enlarges * (plan.upscales or 1)) ** 2
        image_bytes = PIXEL_BYTES[settings.image_format] * pixels / plan.images
        known = "for photographs"
    space = plan.images * (image_bytes + RECORD_BYTES[settings.format])
    return f"disk space: about {jobs.size(space)} as {settings.image_format}, {known}"
