"""jaxdiff against PyTorch diffusers, on this machine and the same checkpoint.

    python -m tools.bench --model shapes64 --batch 1,8 --output bench.json

See docs/benchmarks.md. Needs the extra `bench`: pip install -e ".[bench]".
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from jaxdiff.checkpoint.checkpoint import open_checkpoint
from jaxdiff.errors import InputError
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
MEMORY_FRACTION = 0.9  # of an accelerator, for all engines together
NONE = "none"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, writes the files; 2 with one line for what cannot be used."""
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
            if said.output:  # what has been measured is kept, whatever happens next
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
    width, height = (said.size, said.size) if said.size else checkpoint.default_size
    if width % checkpoint.size_multiple:
        raise InputError(f"--size {width} must be a multiple of {checkpoint.size_multiple}")
    columns = [Column("jaxdiff", said.dtype)]
    if said.torch_dtype != [NONE]:
        columns += [Column("diffusers", dtype) for dtype in said.torch_dtype or [said.dtype]]
    at_once = 1 if said.one_at_a_time else len(columns) + ("job" in said.parts)
    work = Workload(
        model=str(model.resolve()),
        width=width,
        height=height,
        steps=said.steps,
        guidance_scale=said.guidance_scale or checkpoint.default_guidance_scale,
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
    add("--model", default="shapes64", help="shapes64, a directory; sd15, sdxl: random weights")
    add("--parts", type=_one_of(PARTS), default=[*PARTS], help=f"of {','.join(PARTS)}")
    add("--batch", type=_counts, default=[1, 8], help="sizes, such as 1,8")
    add("--size", type=_count, help="of the images in pixels; by default the model's own")
    add("--steps", type=_count, default=STEPS, help="of the model's own sampler")
    add("--guidance-scale", type=float, help="by default the model's own")
    add("--dtype", choices=DTYPES, default="float32", help="jaxdiff's")
    add("--torch-dtype", type=_one_of((*DTYPES, NONE)), help="a column each; none: jaxdiff alone")
    add("--torch-compile", choices=COMPILE_MODES, default="off", help="of U-Net and decoder")
    add("--rounds", type=_count, default=5, help="A B A B: so many pairs")
    add("--turn-seconds", type=float, default=1.0, help="what is shorter is repeated for so long")
    add("--batches-a-turn", type=_count, default=4, help="of images")
    add("--job-images", type=_count, default=512, help="of the job")
    add("--one-at-a-time", action="store_true", help="for models that do not fit memory twice")
    add("--output", type=Path, help="every round, as JSON")
    add("--markdown", type=Path, help="the table, which is printed too")
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
            raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is none of {', '.join(names)}")
        return text.split(",")

    return read


if __name__ == "__main__":
    sys.exit(main())
