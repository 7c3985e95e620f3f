"""Compares jaxdiff with PyTorch diffusers on this machine with the same checkpoint.

    python -m tools.bench --model shapes64 --batch 1,8 --output bench.json

See docs/benchmarks.md. It needs the extra `bench`: pip install -e ".[bench]".
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from tools.bench import checkpoints, measure, report
from tools.bench.engine import Column
from tools.bench.measure import Figure, Plan
from tools.bench.workload import Workload

PARTS: dict[str, Callable[[Workload, Plan], Iterator[Figure]]] = {
    "product": measure.product,
    "text": partial(measure.parts, "text"),
    "step": partial(measure.parts, "step"),
    "decode": partial(measure.parts, "decode"),
    "images": partial(measure.parts, "images"),
    "job": measure.job,
    "start": measure.start,
    "memory": measure.memory,
}
DTYPES = ("float32", "bfloat16")
COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
STEPS = 20
MEMORY_FRACTION = 0.9  # of an accelerator's memory, for all engines together
NONE = "none"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, writes the files; returns 2 with one line for unusable input."""
    said = _parser().parse_args(arguments)
    try:
        work, plan = _plan(said)
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    figures = []
    for part in said.parts:
        for figure in PARTS[part](work, plan):
            figures.append(figure)
            print(report.as_markdown([figure], plan).splitlines()[-1], file=sys.stderr, flush=True)
            if said.output:  # written after each figure, so a later failure loses nothing
                text = json.dumps(report.as_json(figures, work, plan), indent=1)
                said.output.write_text(text + "\n")
    table = report.as_markdown(figures, plan)
    print(table, end="")
    if said.markdown:
        said.markdown.write_text(table)
    return 0


def _plan(said: argparse.Namespace) -> tuple[Workload, Plan]:
    model = checkpoints.directory(said.model)
    checkpoint = open_checkpoint(str(model))
    width, height = (said.size, said.size) if said.size else checkpoint.defaults.size
    if width % checkpoint.defaults.size_multiple:
        raise InputError(
            f"--size {width} must be a multiple of {checkpoint.defaults.size_multiple}"
        )
    columns = [Column("jaxdiff", said.dtype)]
    if said.torch_dtype != [NONE]:
        columns += [Column("diffusers", dtype) for dtype in said.torch_dtype or [said.dtype]]
    at_once = 1 if said.one_at_a_time else len(columns) + ("job" in said.parts)
    work = Workload(
        model=str(model.resolve()),
        width=width,
        height=height,
        steps=said.steps,
        guidance_scale=said.guidance_scale or checkpoint.defaults.guidance_scale,
        batches_a_turn=said.batches_a_turn,
        turn_seconds=said.turn_seconds,
        memory_fraction=MEMORY_FRACTION / at_once,
        compile_mode=said.torch_compile,
    )
    return work, Plan(columns, said.batch, said.rounds, said.one_at_a_time, said.job_images)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--model",
        default="shapes64",
        help="shapes64, a directory, or sd15, sdxl or flux1-dev (random weights)",
    )
    add("--parts", type=_one_of(PARTS), default=[*PARTS], help=f"default: {','.join(PARTS)}")
    add("--batch", type=_counts, default=[1, 8], help="batch sizes (default: 1,8)")
    add("--size", type=_count, help="image size in pixels (default: the model's own)")
    add("--steps", type=_count, default=STEPS, help="steps of the model's own sampler")
    add("--guidance-scale", type=float, help="default: the model's own")
    add("--dtype", choices=DTYPES, default="float32", help="jaxdiff's dtype")
    add("--torch-dtype", type=_one_of((*DTYPES, NONE)), help="one column each; none: only jaxdiff")
    add(
        "--torch-compile",
        choices=COMPILE_MODES,
        default="off",
        help="mode for denoiser and decoder",
    )
    add("--rounds", type=_count, default=5, help="pairs of turns (A B A B)")
    add("--turn-seconds", type=float, default=1.0, help="minimum length of a turn")
    add("--batches-a-turn", type=_count, default=4, help="batches per turn of the part images")
    add("--job-images", type=_count, default=512, help="images per job")
    add("--one-at-a-time", action="store_true", help="run engines one by one, to save memory")
    add("--output", type=Path, help="file for every round, as JSON")
    add("--markdown", type=Path, help="file for the printed table")
    return parser


def _count(text: str) -> int:
    if not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"must be 1 to 1000000: {text}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(each) for each in text.split(",")]


def _one_of(names) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(
                f"unknown value {unknown.pop()!r}; choose from {', '.join(names)}"
            )
        return text.split(",")

    return read


if __name__ == "__main__":
    sys.exit(main())
