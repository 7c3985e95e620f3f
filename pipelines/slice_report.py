"""What a dry run says about a TPU slice or GPUs: does a job fit, and what may it cost there.

Another process compiles, because this one has no JAX. Its answers are kept in the user's cache
directory, so that the same question is answered at once.
"""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from packaging.requirements import Requirement

from jaxdiff import cache
from jaxdiff.checkpoint.fingerprint import file_sha256
from jaxdiff.dataset.settings import Settings
from jaxdiff.devices import batching, slices
from jaxdiff.devices.mesh_sizes import mesh_sizes
from jaxdiff.devices.slices import Slice
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.request import Bucket, Options
from pipelines import slice_program
from pipelines.generate_options import Job
from pipelines.jobs import count, duration, is_debugging, say
from pipelines.slice_program import GIB, Task
from pipelines.target import Target

# The packages with the compilers, and how to install them.
COMPILERS = {
    "TPUs": ("libtpu", "pip install 'jaxdiff[tpu-aot]'"),
    "GPUs": ("jax-cuda12-plugin", "pip install 'jaxdiff[gpu-aot]'"),
}
# What a program depends on, beside the code here, the model and the options.
PACKAGES = ("jax", "jaxlib", "flax")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
ROOT = Path(__file__).parents[1]
# The environment in which programs are compiled for chips that need not exist.
DESCRIBED = {
    "JAX_PLATFORMS": "cpu",  # else JAX looks for the TPUs
    "TPU_SKIP_MDS_QUERY": "1",  # as libtpu does at a service of Google's cloud
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling is possible beside another dry run
}
# JAX could store programs for chips that are not here, but not read them again.
NOTHING_KEPT = {"JAX_ENABLE_COMPILATION_CACHE": "0"}


@dataclass(frozen=True)
class Counted:
    """A bucket of the plan.

    Attributes:
      bucket: it.
      row: its values of `plan.BUCKET_COLUMNS`.
      images: their number.
      operations: those of one image.
    """

    bucket: Bucket
    row: dict
    images: int
    operations: int

    @property
    def example(self) -> dict:
        """The row without what does not count: equal examples have equal programs."""
        row = self.row | {"guidance_scale": 1.0 + self.bucket.guided}
        return row | {name: "" for name in ("mask_image", "outpaint") if row.get(name) is not None}


def lines(
    job: Job,
    settings: Settings,
    ensemble: Ensemble,
    buckets: Sequence[Counted],
    shard_sizes: Sequence[int],
) -> list[str]:
    """Compiles the largest programs of a plan for the job's target and describes them.

    They are that of the largest images, and that of the bucket with most of the work.

    Raises:
      InputError: if a program does not fit or cannot be compiled for the target.
    """
    where = slices.parse(job.target.name)
    check_compiler(where)
    if not ensemble.samples:
        raise InputError(f"--target: {ensemble.name} only enlarges images; this needs a denoiser")
    mesh = mesh_sizes(settings.mesh, math.prod(where.host_sides))
    by_size = max(buckets, key=_size_order)
    by_work = max(buckets, key=lambda each: each.images * each.operations)
    said = []
    for each in {by_size.bucket: by_size, by_work.bucket: by_work}.values():
        task = _task(job, settings, each, max(shard_sizes), mesh["data"])
        account = _account(task, ensemble)
        said += [_title(task, each, account), *_described(each, where, mesh, account), ""]
    if settings.dtype == "float32":
        said += ["float32 takes twice the memory of --dtype bfloat16, which is usual there"]
    if ensemble.upscaler is not None:
        said += ["the upscaler's program is not compiled; its operations are counted"]
    work = sum(each.images * each.operations for each in buckets)
    return [*said, *_bill(job.target, job.price_per_chip_hour, where, mesh, work)]


def largest_batch_size(
    job: Job,
    settings: Settings,
    ensemble: Ensemble,
    buckets: Sequence[Counted],
    shard_sizes: Sequence[int],
) -> int:
    """Returns the largest batch size that fits the job's target, found for the largest images.

    Raises:
      InputError: if not even one image fits, or the program cannot be compiled for the target.
    """
    mesh = mesh_sizes(settings.mesh, math.prod(slices.parse(job.target.name).host_sides))
    largest = max(buckets, key=_size_order)
    most = max(each.images for each in buckets)
    task = _task(job, settings, replace(largest, images=most), max(shard_sizes), mesh["data"])
    account = _account(task, ensemble)
    fitting(task.target, largest.bucket, task.options, account)
    return account["batch_size"]


def _size_order(each: Counted) -> tuple:
    return each.bucket.width * each.bucket.height, each.bucket.guided, each.images


def check_compiler(where: Slice) -> None:
    """Raises InputError if the compiler is missing, or has a version that JAX does not go with."""
    kind = _kind(where)
    package, install = COMPILERS[kind]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"--target needs {package}, which has the compiler for {kind}: {install}"
        ) from None
    for text in importlib.metadata.requires("jax"):
        needed = Requirement(text)
        if needed.name == package and not needed.specifier.contains(version):
            raise InputError(
                f"--target: {package} {version} is installed, but JAX needs {package}"
                f"{needed.specifier}: {install}"
            )


def _kind(where: Slice) -> str:
    return "TPUs" if where.chip.gpu is None else "GPUs"


def _task(job: Job, settings: Settings, each: Counted, most_images: int, parts: int) -> Task:
    """Returns what to compile; tasks are equal if their programs are."""
    fixed, most = settings.batch_size, batching.enough(min(each.images, most_images), parts)
    return Task(
        models=asdict(job.models),
        options={field.name: getattr(settings, field.name) for field in fields(Options)},
        row=each.example,
        target=job.target.name,
        **({"most": most} if fixed == batching.AUTO else {"batch_size": fixed}),
    )


def _account(task: Task, ensemble: Ensemble) -> dict:
    """Returns what `slice_program.account` returns, from the cache if it is there."""
    compiler, _ = COMPILERS[_kind(slices.parse(task.target))]
    identity = {
        "task": asdict(task) | {"models": ensemble.fingerprint},
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, compiler)},
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "code": file_sha256(Path(slice_program.__file__)),
    }

    def compiled() -> bytes:
        size = f"{task.row['width']}x{task.row['height']}"
        say(f"compiling for {task.target} at {size}; a large model takes many minutes")
        return json.dumps(_compiled(task)).encode()

    return json.loads(cache.remembered("slices", json.dumps(identity, sort_keys=True), compiled))


def _compiled(task: Task) -> dict:
    """Runs `slice_program` in a process of its own; raises InputError if it refuses."""
    # Kernels are tuned by running them, which needs the GPU.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipelines.slice_program"],
        input=json.dumps(asdict(task)),
        stdout=subprocess.PIPE,
        stderr=None if is_debugging() else subprocess.DEVNULL,  # libtpu says much
        env=environment({**DESCRIBED, **NOTHING_KEPT, "XLA_FLAGS": flags.strip()}),
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the program cannot be compiled for {task.target}")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise InputError(answer["refused"])
    return answer


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that compiles."""
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(paths)}


def _title(task: Task, each: Counted, account: dict) -> str:
    """Returns the first line about a program; raises InputError if it does not fit."""
    said = fitting(task.target, each.bucket, task.options, account)
    return said if task.batch_size else f"{said}: as many as fit, or as the job needs"


def fitting(where: str, bucket: Bucket, options: dict, account: dict) -> str:
    """Returns what a program is for; raises InputError if it does not fit.

    Args:
      where: the devices.
      options: the fields of `Options`.
      account: the `batch_size`, and why it is `too_large` if it is.
    """
    size = account["batch_size"]
    guided = "guided" if bucket.guided else "not guided"
    title = (
        f"{where}, {bucket.width}x{bucket.height}, {count(bucket.steps, 'step')} of "
        f"{bucket.sampler}, {guided}, batch size {size} per device"
    )
    if "too_large" in account:
        helps = ["a smaller --batch-size"] * (size > 1)
        helps += ["--dtype bfloat16"] * (options["dtype"] == "float32")
        helps += ["--text-encoders unload"] * (options["text_encoders"] == "device")
        helps += ["--text-encoders host"] * (options["text_encoders"] == "unload")
        helps += ["--weights int8"] * (options["weights"] == "full")
        raise InputError(
            f"{title} does not fit: {account['too_large'].rstrip('.')}; what helps: "
            f"{', '.join([*helps, 'more for model in --mesh, such as model=2, or larger chips'])}"
        )
    return title


def _described(each: Counted, where: Slice, mesh: dict, account: dict) -> list[str]:
    sizes, exchanges = account["bytes"], account["exchanges"]
    hosts = f" on each of {where.hosts} hosts" if where.hosts > 1 else ""
    total = f"{_size(sum(sizes.values()))} of {_size(where.chip.memory_bytes)} a chip"
    parts = ", ".join(f"{what} {_size(size)}" for what, size in sizes.items())
    exchanged = ", ".join(f"{number} {kind}" for kind, number in exchanges.items()) or "none"
    said = [
        f"  mesh: data={mesh['data']},model={mesh['model']}{hosts}",
        f"  it fits: {total}: {parts}",
        f"  exchanges between chips: {exchanged}",
        f"  operations: {each.operations:.2e} an image",
    ]
    if where.chip.gpu is not None:
        return [*said, "  attention is compiled without cuDNN's kernels, which need the GPU itself"]
    if exchanges:
        said[2] += f", {_exchanged(**account['exchanged'])}"
    said[2] += f"; Pallas kernels: {account['kernels']}"
    return [*said, f"  {_estimate(each, where, mesh, account)}"]


def _exchanged(turns: int, sampling: int, rest: int) -> str:
    return (
        f"about {_size(sampling // max(1, turns))} for each chip in each turn of the sampling loop "
        f"and {_size(rest)} in the rest"
    )


def _estimate(each: Counted, where: Slice, mesh: dict, account: dict) -> str:
    cycles, hertz = account["cycles"], where.chip.hertz
    images = account["batch_size"] * mesh["data"]
    turn = cycles["sampling"] / max(1, cycles["turns"])
    said = (
        f"the compiler's estimate for {count(images, 'image')}: {_time(turn, hertz)} in each of "
        f"{count(cycles['turns'], 'turn')} of the sampling loop, {_time(cycles['rest'], hertz)} in "
        "the rest; it leaves out Pallas kernels (attention) and exchanges"
    )
    if hertz is None:
        return said
    seconds = (cycles["sampling"] + cycles["rest"]) / hertz
    speed = images * each.operations / seconds
    share = speed / (mesh["data"] * mesh["model"] * where.chip.flops)
    return f"{said}, and would be {100 * share:.2g}% of the chips' peak"


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _time(cycles: float, hertz: float | None) -> str:
    """Returns a number of cycles, and the milliseconds if the chip's clock is known."""
    text = f"{cycles / 1e6:.3g} million cycles"
    return text if hertz is None else f"{text} ({1000 * cycles / hertz:.3g} ms)"


def _bill(target: Target, price: float | None, where: Slice, mesh: dict, work: int) -> list[str]:
    chips = where.hosts * mesh["data"] * mesh["model"]  # a mesh may leave some idle
    peak = chips * where.chip.flops
    seconds = work / (peak * target.utilisation)
    said = (
        f"the job on {target.name}: about {work:.1e} operations: {duration(seconds)} at "
        f"{target.utilisation:.0%} of the peak of {count(chips, 'chip')} ({peak / 1e12:.0f} "
        "TFLOP/s in bfloat16), plus loading, compilation and padding"
    )
    if price is None:
        return [said]
    cost = seconds / 3600 * where.chips * price
    return [
        said,
        f"the bill: {cost:.2f} for {count(where.chips, 'chip')} at {price:g} an hour each",
    ]
