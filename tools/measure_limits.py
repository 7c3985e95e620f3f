"""Measures known failures of small text-to-image models: the figures of docs/limits.md.

    python -m tools.measure_limits --model shapes64 --recipe configs/train/shapes64.toml \\
        --held-out-model runs/held-out/model --output out/limits

It makes images with `jaxdiff generate` and scores them with the shapes world's exact scorer. It
measures counting errors by number, colors bound to the wrong object, combinations of color and
shape held out of a separate training run, and how near images come to training scenes. If it is
interrupted, run the same command to continue. It writes limits.json, tables.md and three pictures.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff import cli
from jaxdiff.errors import InputError
from jaxdiff.evaluation import datasets
from jaxdiff.images.image_files import decode
from jaxdiff.training.loop import grid
from jaxdiff.training.recipe import Data, TextToImageRecipe, read
from jaxdiff.training.shapes import scenes
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.captions import NUMBERS, draw_caption, pick

MOST_SEEN = 7  # larger counts go into the same column
BLOCK = 2048  # training scenes compared at once
PAIRS_SHOWN = 8
# A checkpoint's defaults are Stable Diffusion's, with which a model this small draws nothing.
HELD_OUT_SAMPLING = ("--steps", "20", "--guidance-scale", "2", "--eta", "1")
RIGHT, SWAPPED = "right", "colors swapped"
BINDINGS = (RIGHT, SWAPPED, "other colors", "one missing", "one too many", "other")


@dataclass(frozen=True)
class Sizes:
    """Numbers of images: per counted number, of two objects, per held-out pair, and at random."""

    counting: int = 100
    binding: int = 400
    held_out: int = 20
    memory: int = 1000


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 with one line on stderr for unusable input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="shapes64", help="model to measure (default: shapes64)")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe that trained its U-Net")
    parser.add_argument("--held-out-model", help="model trained with --held-out-recipe")
    parser.add_argument("--held-out-recipe", type=Path, default=Path("configs/train/held-out.toml"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        found = measure(options.model, text_to_image_recipe(options.recipe), options.output)
        if options.held_out_model:
            recipe = text_to_image_recipe(options.held_out_recipe)
            found |= measure_held_out(options.held_out_model, recipe.data, options.output)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (options.output / "limits.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "tables.md").write_text(tables(found))
    print(tables(found))
    return 0


def text_to_image_recipe(path: Path) -> TextToImageRecipe:
    """Reads a recipe for scenes of the shapes world; raises InputError for any other."""
    recipe = read(path)
    if not isinstance(recipe, TextToImageRecipe) or recipe.data.path != scenes.PIXELS:
        raise InputError(f"{path}: not a text_to_image recipe on the shapes world")
    return recipe


def measure(
    model: str, recipe: TextToImageRecipe, output: Path, sizes: Sizes = Sizes(), seed: int = 11
) -> dict:
    """Measures counting, binding and memorisation of a model trained with `recipe`.

    Returns:
      the input of `tables`; the pictures are written to `output`.
    """
    made = images_of(model, limit_rows(sizes, seed), output / "images", seed)
    counted = confusion(made["counting"])
    bound = Counter(binding(row, pixels) for row, pixels in made["binding"])
    draw_confusion(counted, output / "counting.png")
    return {
        "model": model,
        "sizes": asdict(sizes),
        "counting": counted.tolist(),
        "binding": {kind: bound[kind] for kind in BINDINGS},
        "memorisation": memorisation(model, recipe, made["memory"], output, seed),
    }


def measure_held_out(
    model: str, data: Data, output: Path, sizes: Sizes = Sizes(), seed: int = 11
) -> dict:
    """Measures how a model draws the pairs held out of its training, and those it was shown."""
    rows = held_out_rows(data.held_out, sizes.held_out)
    made = images_of(model, rows, output / "held-out-images", seed, *HELD_OUT_SAMPLING)
    return {name: pair_counts(made[name]) for name in ("held_out", "shown")}


def limit_rows(sizes: Sizes, seed: int) -> Iterator[dict]:
    """Yields manifest rows in the benchmark's schema, each with the limit that it measures."""
    rng = np.random.default_rng(seed)
    for count in (1, *NUMBERS):
        for _ in range(sizes.counting):
            group = shapes.Group(pick(rng, shapes.SHAPES), pick(rng, shapes.COLORS), count)
            yield {"limit": "counting", **shapes.row_for(shapes.Caption((group,)))}
    for _ in range(sizes.binding):
        kinds = rng.choice(shapes.SHAPES, 2, replace=False)
        colors = rng.choice(list(shapes.COLORS), 2, replace=False)
        groups = tuple(shapes.Group(str(s), str(c)) for s, c in zip(kinds, colors, strict=True))
        yield {"limit": "binding", **shapes.row_for(shapes.Caption(groups))}
    for _ in range(sizes.memory):
        yield {"limit": "memory", **shapes.row_for(draw_caption(rng))}


def held_out_rows(held_out: Sequence[str], images: int) -> Iterator[dict]:
    """Yields rows for each held-out pair, and the same total for the pairs that were shown."""
    pairs = {
        f"{color} {shape}": (shape, color) for color in shapes.COLORS for shape in shapes.SHAPES
    }
    shown = [pair for pair in pairs if pair not in held_out]
    for limit, names in (("held_out", held_out), ("shown", shown)):
        for number in range(images * len(held_out)):
            group = shapes.Group(*pairs[names[number % len(names)]])
            yield {"limit": limit, **shapes.row_for(shapes.Caption((group,)))}


def images_of(
    model: str, rows: Iterable[dict], output: Path, seed: int, *options: str
) -> dict[str, list]:
    """Makes the rows' images; returns (row, pixels uint8 [64, 64, 3]) pairs by limit.

    Args:
      options: further options of `jaxdiff generate`.

    Raises:
      InputError: if the job cannot make all of them.
    """
    manifest = output.with_suffix(".jsonl")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--manifest", str(manifest), "--output", str(output), "--model", model]
    if code := cli.main(["generate", *command, "--seed", str(seed), *options]):
        raise InputError(
            f"jaxdiff generate ended with exit code {code}; run this command again to continue"
        )
    made: dict[str, list] = {}
    for picture in datasets.of_dataset(output):
        row, pixels = picture.prompt.row, picture.image and decode(picture.image)
        made.setdefault(row["limit"], []).append((row, pixels))
    return made


def confusion(made: Sequence[tuple[dict, np.ndarray]]) -> np.ndarray:
    """Counts images by objects asked for and objects seen: int [5, MOST_SEEN + 1]."""
    counts = np.zeros((max(NUMBERS), MOST_SEEN + 1), int)
    for row, pixels in made:
        seen = min(len(shapes.read(pixels).objects), MOST_SEEN)
        counts[row["include"][0]["count"] - 1, seen] += 1
    return counts


def binding(row: dict, pixels: np.ndarray) -> str:
    """Classifies an image of two colored objects as one of `BINDINGS`."""
    wanted = [(entry["class"], entry["color"]) for entry in row["include"]]
    (shape, color), (other_shape, other_color) = wanted
    swapped = Counter([(shape, other_color), (other_shape, color)])
    wanted = Counter(wanted)
    found = Counter((thing.shape, thing.color) for thing in shapes.read(pixels).objects)
    if found == wanted:
        return RIGHT
    if found == swapped:
        return SWAPPED
    if sorted(s or "" for s, _ in found.elements()) == sorted((shape, other_shape)):
        return "other colors"
    if found < wanted and found.total() == 1:
        return "one missing"
    return "one too many" if found > wanted and found.total() == 3 else "other"


def pair_counts(made: Sequence[tuple[dict, np.ndarray]]) -> dict[str, int]:
    """Counts, for images of one object, how many are right in all, in shape and in color."""
    counts = Counter(images=len(made), pairs=len({row["prompt"] for row, _ in made}))
    for row, pixels in made:
        things = shapes.read(pixels).objects
        wanted = row["include"][0]
        counts["right"] += shapes.judge(row, pixels).correct
        counts["one object"] += len(things) == 1
        if len(things) == 1:
            counts["its shape"] += things[0].shape == wanted["class"]
            counts["its color"] += things[0].color == wanted["color"]
    names = ("pairs", "images", "right", "one object", "its shape", "its color")
    return {name: counts[name] for name in names}


def memorisation(
    model: str, recipe: TextToImageRecipe, made: list, output: Path, seed: int
) -> dict:
    """Measures distances to the nearest training scene, of images and of fresh scenes.

    The fresh scenes are drawn for the same captions and passed through the model's autoencoder, so
    the only difference is that the images were generated.
    """
    generated = np.stack([pixels for _, pixels in made])
    rng = np.random.default_rng([seed, 1])
    captions = (shapes.caption_for(row) for row, _ in made)
    drawn = [shapes.scene_for(caption, rng, recipe.data.composed) for caption in captions]
    fresh = np.stack([shapes.render(scene) for scene in drawn])
    both = np.concatenate([generated, reconstructed(model, fresh)])
    distances, nearest = nearest_scenes(both, recipe.data, recipe.seed)
    ours, theirs = np.split(distances, 2)
    closest = np.argsort(ours)[:PAIRS_SHOWN]
    trained = [shapes.render(scenes.draw(recipe.data, recipe.seed, nearest[i])[0]) for i in closest]
    pairs = grid(np.concatenate([generated[closest], trained]), columns=len(closest))
    Image.fromarray(pairs.repeat(2, axis=0).repeat(2, axis=1)).save(output / "closest.png")
    draw_distances(ours, theirs, output / "memorisation.png")
    return {
        "scenes": recipe.data.scenes,
        "generated": quantiles(ours),
        "fresh": quantiles(theirs),
        "nearer than the nearest 1% of fresh": int((ours < np.quantile(theirs, 0.01)).sum()),
    }


def nearest_scenes(images: np.ndarray, data: Data, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the RMS distance (0 to 255) to the nearest training scene, and the scene's number.

    Args:
      images: uint8 [n, 64, 64, 3].
      data, seed: from the recipe, whose scenes are drawn again in blocks.
    """

    def flat(pixels: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(pixels).reshape(len(pixels), -1).astype(np.float32) / 255.0

    ours = flat(images)
    least = np.full(len(images), np.inf, np.float32)
    nearest = np.zeros(len(images), int)
    for start in range(0, data.scenes, BLOCK):
        numbers = range(start, min(start + BLOCK, data.scenes))
        block = flat([shapes.render(scenes.draw(data, seed, number)[0]) for number in numbers])
        squared = (block**2).sum(axis=1) - 2.0 * ours @ block.T
        best = squared.argmin(axis=1)
        value = squared[np.arange(len(images)), best]
        nearest = np.where(value < least, start + best, nearest)
        least = np.minimum(value, least)
    squared = np.maximum(least + (ours**2).sum(axis=1), 0.0)
    return 255.0 * np.sqrt(squared / ours.shape[1]), nearest


def reconstructed(model: str, pixels: np.ndarray, at_once: int = 50) -> np.ndarray:
    """Encodes and decodes images, uint8 [n, 64, 64, 3], with the model's autoencoder."""
    import jax
    import jax.numpy as jnp

    from jaxdiff.engine.program import to_float, to_pixels
    from jaxdiff.training.components import load_model

    parts = load_model(model)
    codec = parts.model.codec

    @jax.jit
    def both_ways(params, pixels):
        latents = codec.scale(codec.encode(params, to_float(pixels))[0])
        return to_pixels(codec.decode(params, latents, jnp.float32))

    blocks = [pixels[i : i + at_once] for i in range(0, len(pixels), at_once)]
    return np.concatenate([np.asarray(both_ways(parts.params[codec.component], b)) for b in blocks])


def quantiles(distances: np.ndarray) -> dict[str, float]:
    """Returns the minimum, the 1% and 50% quantiles, and the number of distances."""
    least, first, median = np.quantile(distances, [0.0, 0.01, 0.5]).round(2)
    return {"images": len(distances), "least": least, "1%": first, "median": median}


def draw_confusion(counts: np.ndarray, path: Path) -> None:
    """Draws the confusion matrix of numbers asked for and numbers seen."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(5, 3.4), layout="tight")).subplots()
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0)
    for (asked, seen), count in np.ndenumerate(counts):
        axes.text(seen, asked, str(count), ha="center", va="center")
    axes.set_yticks(range(len(counts)), range(1, len(counts) + 1))
    axes.set_xticks(range(MOST_SEEN + 1), [*range(MOST_SEEN), f"{MOST_SEEN}+"])
    axes.set(xlabel="objects seen", ylabel="objects asked for")
    figure.savefig(path, dpi=100)


def draw_distances(generated: np.ndarray, fresh: np.ndarray, path: Path) -> None:
    """Draws histograms of how near images and fresh scenes come to training scenes."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.4), layout="tight")).subplots()
    bins = np.linspace(0.0, max(generated.max(), fresh.max()), 50)
    for distances, label in ((generated, "generated"), (fresh, "fresh scenes")):
        axes.hist(distances, bins, histtype="step", label=label)
    axes.set(xlabel="distance to the nearest training scene (RMS, 0 to 255)", ylabel="images")
    axes.legend()
    figure.savefig(path, dpi=100)


def tables(found: dict) -> str:
    """Returns the tables of docs/limits.md as Markdown."""
    counts = np.array(found["counting"])
    seen = [*map(str, range(MOST_SEEN)), f"{MOST_SEEN}+"]
    text = _table(
        ["asked for", *(f"{name} seen" for name in seen), "right"],
        [[asked, *row, _share(row[asked], row.sum())] for asked, row in enumerate(counts, start=1)],
    )
    total = sum(found["binding"].values())
    text += _table(
        ["two colored objects", "images", "share"],
        [[kind, count, _share(count, total)] for kind, count in found["binding"].items()],
    )
    if "held_out" in found:
        names = list(found["held_out"])
        text += _table(
            ["pairs of color and shape", *names, "share right"],
            [
                [label, *found[key].values(), _share(found[key]["right"], found[key]["images"])]
                for key, label in (("shown", "seen in training"), ("held_out", "held out"))
            ],
        )
    memory = found["memorisation"]
    return text + _table(
        ["nearest training scene", "images", "minimum", "1%", "median"],
        [[key, *memory[key].values()] for key in ("generated", "fresh")],
    )


def _share(count: int, total: int) -> str:
    return f"{count / max(total, 1):.1%}"


def _table(head: Sequence, rows: Iterable[Sequence]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
