"""Score a model on the shapes world: write the benchmark's manifest, then read the dataset back.

python tools/score_shapes.py manifest --per-tag 50 --images 4 --seed 1 --output rows.jsonl
jaxdiff generate --manifest rows.jsonl --output out/score --guidance-scale 4 --steps 20
python tools/score_shapes.py score out/score
"""

import argparse
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS

MAX_MEMBER = 1 << 20  # bytes; a 64 px PNG has some 2 kB
MEMBER_NAME = re.compile(r"(\d+)\.(png|webp|jpe?g|json|txt)")


def manifest_rows(per_tag: int, images: int, seed: int) -> Iterator[dict]:
    """The benchmark as manifest rows, `per_tag` of each tag, each asking for `images` images."""
    for tag in shapes.TAGS:
        for number, row in enumerate(shapes.benchmark_rows(tag, per_tag, seed)):
            yield {"id": f"{tag}-{number:04d}", "num_images": images} | row


def dataset_pairs(directory: Path) -> Iterator[tuple[dict, np.ndarray]]:
    """Stream (benchmark row, pixels uint8 [64, 64, 3]) from the WebDataset shards of a dataset.

    Raises InputError for a shard that holds anything but finished 64 px images of benchmark rows.
    """
    paths = sorted(directory.glob("data/*.tar"))
    if not paths:
        raise InputError(f"{directory}: no data/*.tar; give the directory of a finished dataset")
    for path in paths:
        try:
            with tarfile.open(path, "r:") as shard:
                yield from _shard_pairs(shard, path)
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{path}: not a whole tar file ({error}); run the job again") from None


def _shard_pairs(shard: tarfile.TarFile, path: Path) -> Iterator[tuple[dict, np.ndarray]]:
    key, parts = None, {}
    for member in shard:
        match = MEMBER_NAME.fullmatch(member.name)
        if not match or not member.isfile() or member.size > MAX_MEMBER:
            raise InputError(f"{path}: member {member.name!r} is not a shard's; rebuild the shard")
        if match[1] != key:
            key, parts = match[1], {}
        kind = match[2] if match[2] in ("json", "txt") else "image"
        parts[kind] = shard.extractfile(member).read()
        if kind != "txt" and {"json", "image"} <= parts.keys():
            place = f"{path}: {key}"
            yield _row(parts["json"], place), _pixels(parts["image"], place)


def _row(text: bytes, place: str) -> dict:
    try:
        record = json.loads(text)
        return record["metadata"] | {"prompt": str(record["prompt"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{place}: no prompt and metadata; use the tool's own manifest") from None


def _pixels(data: bytes, place: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (CANVAS, CANVAS):  # known before anything is decoded
                raise InputError(f"{place}: {image.size} px; the scorer reads {CANVAS} x {CANVAS}")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{place}: not a readable image ({error})") from None


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
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
