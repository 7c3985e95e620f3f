"""Traces parts of jaxdiff and lists the operations that take most of the device's time.

    python -m tools.bench.profile --model sd15 --batch 8 --dtype bfloat16 --output DIR

For each part it writes a trace for TensorBoard, Perfetto or xprof to DIR/PART, and the table to
DIR/PART.md. On a GPU an operation is a kernel; on a CPU the milliseconds of all threads add up.
"""

import argparse
import collections
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxdiff.families import open_checkpoint
from tools.bench import checkpoints, ours
from tools.bench.workload import Workload

RUNS = 5
TOP = 25  # operations in the table
OPERATION = "hlo_op"  # a statistic of the events of operations, on a CPU


def table(folder: Path) -> str:
    """Returns a Markdown table of the operations in a trace: ms and calls per run."""
    path = max(folder.glob("plugins/profile/*/*.xplane.pb"))  # the newest
    milliseconds, calls = collections.Counter(), collections.Counter()
    for event in _operations(jax.profiler.ProfileData.from_file(str(path))):
        milliseconds[event.name] += event.duration_ns / 1e6 / RUNS
        calls[event.name] += 1
    total = milliseconds.total()
    rows = [f"| all {len(calls)} | {total:.3f} | 100% | {calls.total() / RUNS:g} |"]
    for name, spent in milliseconds.most_common(TOP):
        rows.append(f"| `{name}` | {spent:.3f} | {spent / total:.1%} | {calls[name] / RUNS:g} |")
    return "\n".join(
        ["| operation | ms | share | calls |", "| --- | ---: | ---: | ---: |", *rows, ""]
    )


def _operations(trace: jax.profiler.ProfileData) -> Iterator[jax.profiler.ProfileEvent]:
    """Yields the events of a GPU's streams or, without one, of a CPU's threads."""
    planes = [*trace.planes]
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            if gpus:  # whose other lines add up what its streams did
                yield from line.events if line.name.startswith("Stream") else ()
            else:
                yield from (event for event in line.events if OPERATION in dict(event.stats))


def main(arguments: list[str] | None = None) -> int:
    """Traces each part, and prints and writes its table."""
    said = _parser().parse_args(arguments)
    model = checkpoints.directory(said.model)
    defaults = open_checkpoint(str(model)).defaults
    width, height = (said.size, said.size) if said.size else defaults.size
    work = Workload(
        model=str(model.resolve()),
        width=width,
        height=height,
        steps=1,
        guidance_scale=defaults.guidance_scale,
        batches_a_turn=1,
        turn_seconds=0.0,
        memory_fraction=1.0,
        compile_mode="off",
    )
    ours.prepare_process(work)
    for part in said.parts.split(","):
        run = ours.PARTS[part](work, said.dtype, said.batch)
        run()  # compiles
        with jax.profiler.trace(said.output / part):
            for _ in range(RUNS):
                run()
        text = table(said.output / part)
        (said.output / f"{part}.md").write_text(text)
        print(f"{part}, batch {said.batch}, {said.dtype}:\n\n{text}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.profile", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--model", default="shapes64", help="as in tools.bench (default: shapes64)")
    add("--parts", default="step,decode", help="default: step,decode")
    add("--batch", type=int, default=8, help="default: 8")
    add("--size", type=int, help="image size in pixels (default: the model's own)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--output", type=Path, required=True, help="folder for traces and tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
