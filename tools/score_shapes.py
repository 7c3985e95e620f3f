"""Score a model on the shapes world: write the benchmark's manifest, then read the dataset back.

python tools/score_shapes.py manifest --per-tag 50 --images 4 --seed 1 --output rows.jsonl
jaxdiff generate --manifest rows.jsonl --output out/score
python tools/score_shapes.py score out/score
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import formats
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.images import decode
from jaxdiff.errors import InputError
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS


def manifest_rows(per_tag: int, images: int, seed: int) -> Iterator[dict]:
    """The benchmark as manifest rows, `per_tag` of each tag, each asking for `images` images."""
    for tag in shapes.TAGS:
        for number, row in enumerate(shapes.benchmark_rows(tag, per_tag, seed)):
            yield {"id": f"{tag}-{number:04d}", "num_images": images} | row


def dataset_pairs(directory: Path) -> Iterator[tuple[dict, np.ndarray | None]]:
    """Stream (benchmark row, pixels uint8 [64, 64, 3]) for every planned image of a dataset.

    An image that could not be made has None for its pixels. Raises InputError for anything but a
    finished dataset of 64 px images.
    """
    plan = plans.load(directory)
    if plan is None:
        raise InputError(f"{directory} holds no jaxdiff run")
    if not (directory / layout.SUCCESS).exists():
        raise InputError(f"{directory} is not finished; run its generate command again")
    _, _, read = formats.FORMATS[plan.settings.format]
    for shard in range(len(plan.shard_sizes)):
        path = directory / shards.file_names(plan, shard)[0]
        try:
            made = {sample.record["key"]: sample.image for sample in read(path)}
            for image in plans.read_shard(directory, plan, shard):
                request = image.request
                if (request.width, request.height) != (CANVAS, CANVAS):
                    raise InputError(f"{path} has images of another size than {CANVAS} x {CANVAS}")
                row = json.loads(image.metadata) | {"prompt": request.prompt}
                yield row, decode(made[image.key]) if image.key in made else None
        except (OSError, ValueError) as problem:
            raise InputError(f"{path}: {problem}; run jaxdiff verify") from None


def _count(text: str) -> int:
    if not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"must be 1 to 100000: {text}")
    return int(text)


def _seed(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more: {text}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on stderr for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    manifest = commands.add_parser("manifest", help="write the benchmark's manifest")
    manifest.add_argument(
        "--per-tag", type=_count, default=50, help="prompts of each of the six tags"
    )
    manifest.add_argument("--images", type=_count, default=4, help="images of each prompt")
    manifest.add_argument("--seed", type=_seed, default=1, help="draws the prompts")
    manifest.add_argument("--output", type=Path, required=True)
    scoring = commands.add_parser("score", help="judge a finished dataset")
    scoring.add_argument("dataset", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "manifest":
            rows = manifest_rows(options.per_tag, options.images, options.seed)
            options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            print(shapes.table(shapes.score(dataset_pairs(options.dataset))))
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
