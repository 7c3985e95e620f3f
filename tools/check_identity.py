"""Checks on this machine's device that an image depends on its request alone, bit for bit.

    python -m tools.check_identity --model sd15 --dtype float32,bfloat16 --batch 1,4,16

`--model` is as in tools/bench: a directory, a bundled model, or sd15, sdxl or flux1-dev with random
weights. For each dtype and batch size it makes a batch of different images and compares with it:

    again        the same batch once more
    slot         the same images in other orders, so that each takes every slot of the batch
    neighbours   the first image beside others
    padding      the first image alone, in a batch that is filled up with copies
    batch        the first image in the smallest of the batches
    process      the first image as another process made it, whose images are the file `--before`

Prompts are encoded anew each time, in another order, too; "text" compares only their embeddings in
other orders. docs/architecture.md promises that all but the last two are equal: the exit code is 1
if one is not. On a CPU the size of batches follows from the size of the images.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jaxdiff
from jaxdiff.engine.embeddings import EmbeddingCache
from jaxdiff.engine.prompts import TEXT_BATCH
from jaxdiff.errors import InputError
from jaxdiff.request import Request
from tools.bench import checkpoints, workload

NOT_PROMISED = ("batch", "process")
STEPS = 4
OTHERS = 1000  # the number of the first image that is no image of a batch


class Row(NamedTuple):
    """A comparison: how many of its values differ, and by how much at most."""

    dtype: str
    batch: int
    what: str
    is_promised: bool
    differ: int
    at_most: float


def main(arguments: list[str] | None = None) -> int:
    """Checks, prints a table and writes the report; returns 1 for a broken promise."""
    said = _parser().parse_args(arguments)
    before = dict(np.load(said.before)) if said.before else {}
    rows, first_images = [], {}
    print("| dtype | batch | what | promised | values that differ | by at most |")
    print("| --- | ---: | --- | --- | ---: | ---: |")
    try:
        for dtype in said.dtype.split(","):
            for row in _rows(said, dtype, before, first_images):
                rows.append(row)
                cells = row._replace(is_promised="yes" if row.is_promised else "no")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                if said.output:  # written after each row, so a later failure loses nothing
                    _write(said, rows)
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if said.images:
        np.savez_compressed(said.images, **first_images)
    return int(any(row.is_promised and row.differ for row in rows))


def _rows(
    said: argparse.Namespace, dtype: str, before: Mapping, first_images: dict
) -> Iterator[Row]:
    """Loads the model and compares; adds the first image of each batch to `first_images`."""
    directory = checkpoints.directory(said.model)
    model = jaxdiff.load(str(directory), dtype=dtype, mesh="data=1")
    settings = {"width": said.size, "height": said.size, "steps": said.steps}
    example = model.resolve(Request(prompt="", **settings))

    def row(batch: int, what: str, values: np.ndarray, others: np.ndarray) -> Row:
        difference = np.abs(np.subtract(values, others, dtype=np.float32))
        is_promised = what not in NOT_PROMISED
        differ = int(np.count_nonzero(difference))
        return Row(dtype, batch, what, is_promised, differ, float(difference.max()))

    yield row(TEXT_BATCH, "text", *_in_all_orders(partial(_embeddings, model), TEXT_BATCH))
    smallest = None
    for batch in sorted({model.slots(example, batch) for batch in said.batch}):
        make = partial(_pixels, model, settings, batch)
        images = make(range(batch))
        first = first_images[f"{dtype} {batch}"] = images[:1]
        yield row(batch, "again", images, make(range(batch)))
        if batch > 1:
            yield row(batch, "slot", *_in_all_orders(make, batch))
            beside_others = make([0, *range(OTHERS, OTHERS + batch - 1)])
            yield row(batch, "neighbours", first, beside_others[:1])
            yield row(batch, "padding", first, make([0]))
        if smallest is None:
            smallest = first
        else:
            yield row(batch, "batch", first, smallest)
        if (name := f"{dtype} {batch}") in before:
            yield row(batch, "process", first, before[name])


def _in_all_orders(make, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is made of the numbers below `count`, and of them in all slots."""
    made = make(range(count))
    turned = [np.roll(make(np.roll(range(count), by)), -by, axis=0) for by in range(1, count)]
    return made, np.stack(turned)


def _pixels(model, settings: Mapping, batch: int, numbers: Sequence[int]) -> np.ndarray:
    """Makes the images of these numbers, uint8 [count, height, width, 3]."""
    _forget(model)
    requests = [
        Request(prompt=workload.prompts(number, 1)[0], seed=int(number), **settings)
        for number in numbers
    ]
    images = model.generate(requests, batch)
    if not all(image.finite and image.pixels.std() for image in images):
        raise InputError("an image is not finite or of one color, so that it can show nothing")
    return np.stack([image.pixels for image in images])


def _embeddings(model, numbers: Sequence[int]) -> np.ndarray:
    """Encodes the prompts of these numbers, float32 [count, ...]."""
    encode = _forget(model)
    texts = encode([workload.prompts(number, 1)[0] for number in numbers])
    return np.stack([np.asarray(text.context, np.float32) for text in texts])


def _forget(model):
    """Makes the model encode all prompts anew; returns its encoder of prompts."""
    encoder = model._sampler._denoisers[0].prompts
    encoder._cache = {kind: EmbeddingCache(encoder.mesh) for kind in encoder._cache}
    return encoder


def _write(said: argparse.Namespace, rows: Sequence[Row]) -> None:
    report = {
        "model": said.model,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": [row._asdict() for row in rows],
    }
    said.output.write_text(json.dumps(report, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_identity", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--model", default="shapes64-4step", help="default: shapes64-4step")
    add("--dtype", default="float32", help="one or several: float32,bfloat16 (default: float32)")
    add("--batch", default=[8], type=lambda text: [*map(int, text.split(","))], help="default: 8")
    add("--size", type=int, help="image size in pixels (default: the model's own)")
    add("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    add("--output", type=Path, help="file for the report, as JSON")
    add("--images", type=Path, help="file for the first image of each batch, as .npz")
    add("--before", type=Path, help="the file of another process to compare with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
