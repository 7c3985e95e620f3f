"""Teaches the bundled model a seventh shape: makes training images and prompts, scores results.

python -m tools.draw_shape images --output out/hearts
jaxdiff train configs/train/lora-heart.toml --output runs/lora-heart
python -m tools.draw_shape manifest --images 4 --output hearts.jsonl
jaxdiff generate --manifest hearts.jsonl --output out/with-lora \
    --lora runs/lora-heart/model/pytorch_lora_weights.safetensors
python -m tools.draw_shape score out/with-lora
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.evaluation import datasets
from jaxdiff.images.image_files import decode
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import verdict
from jaxdiff.worlds.shapes.captions import Caption, Group
from jaxdiff.worlds.shapes.scene import BACKGROUNDS, COLORS, HEART, SHAPES

TAUGHT_PX = 20.0  # minimum size: smaller hearts cover only a pixel or two of the latents
TAUGHT = 20  # of the 24 pairs of color and background; the other four are held out
LOOKED_FOR = (*SHAPES, HEART)


def pairs() -> list[tuple[str, str]]:
    """Returns every (color, background) in a fixed random order; the first `TAUGHT` are taught."""
    every = list(itertools.product(COLORS, BACKGROUNDS))
    return [every[index] for index in np.random.default_rng(7).permutation(len(every))]


def caption(color: str, background: str) -> Caption:
    """Returns the caption of a heart."""
    return Caption((Group(HEART, color),), background=background)


def write_images(directory: Path) -> None:
    """Writes an imagefolder: one heart per image, at a random position, and its caption."""
    directory.mkdir(parents=True)
    rng, rows = np.random.default_rng(7), []
    for number, pair in enumerate(pairs()[:TAUGHT]):
        said, name = caption(*pair), f"{number:02d}.png"
        while (scene := shapes.scene_for(said, rng)).objects[0].size < TAUGHT_PX:
            pass
        Image.fromarray(shapes.render(scene)).save(directory / name)
        rows.append({"file_name": name, "text": said.text()})
    (directory / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest_rows(images: int) -> Iterator[dict]:
    """Yields a manifest row for each pair, with the columns that `score` reads."""
    for number, (color, background) in enumerate(pairs()):
        yield {
            "id": f"{'taught' if number < TAUGHT else 'new'}-{color}-{background}",
            "prompt": caption(color, background).text(),
            "num_images": images,
            "color": color,
            "background": background,
            "taught": number < TAUGHT,
        }


def score(directory: Path) -> Iterator[str]:
    """Counts the images of a dataset that match their prompts exactly, and why the others do not.

    Raises:
      InputError: as `datasets.of_dataset`.
    """
    right, asked, shown, reasons = Counter(), Counter(), 0, Counter()
    for picture in datasets.of_dataset(directory):
        row = picture.prompt.row
        kind = "taught pairs" if row["taught"] else "unseen pairs"
        asked[kind] += 1
        if picture.image is None:
            reasons["not made"] += 1
            continue
        scene = shapes.read(decode(picture.image), LOOKED_FOR)
        shown += any(thing.shape == HEART for thing in scene.objects)
        judged = verdict.compare(caption(row["color"], row["background"]), scene)
        right[kind] += judged.correct
        if not judged.correct:
            reasons[judged.reason.partition(":")[0]] += 1
    for kind, count in asked.items():
        yield f"{kind}: {right[kind]} of {count} images are right"
    yield f"{shown} of {asked.total()} images show a heart"
    for reason, count in reasons.most_common():
        yield f"  {reason}: {count}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 with one line on stderr for unusable input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("images", help="write the training images")
    drawing.add_argument("--output", type=Path, required=True)
    asking = commands.add_parser("manifest", help="write the prompts")
    asking.add_argument("--images", type=int, default=4, help="images per prompt (24 prompts)")
    asking.add_argument("--output", type=Path, required=True)
    scoring = commands.add_parser("score", help="count the hearts of a finished dataset")
    scoring.add_argument("dataset", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "images":
            write_images(options.output)
        elif options.command == "manifest":
            rows = manifest_rows(options.images)
            options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            print("\n".join(score(options.dataset)))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
