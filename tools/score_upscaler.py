"""Compares upscalers with the shapes world's renderer: PSNR and the sharpness of edges.

Held-out scenes are rendered at 64x64 and, as the truth, at 256x256 pixels. Sharpness is the mean
length of the color gradient where the truth has edges, as a share of the truth's: 1 is as sharp as
the truth, more is too sharp.

    python -m tools.score_upscaler shapes64-x4 runs/shapes64-x4/model/upscaler.safetensors
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.training.loop import grid
from jaxdiff.worlds import shapes

SCENES, SEED = 1000, 20_000_000  # a seed that no recipe uses
SCALE = 4
EDGE = 16  # of 255: a steeper gradient of the truth is an edge
AT_ONCE = 50  # scenes
SHOWN = 4  # scenes in the picture


def main() -> None:
    """Prints a row for bicubic interpolation and for each model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["shapes64-x4"])
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--picture", type=Path, help="write the first scenes to this file")
    said = parser.parse_args()
    print(f"{'':40} {'PSNR':>8} {'over bicubic':>13} {'sharpness':>10}")
    base = None
    enlargers = {name: _enlarger(name) for name in ("bicubic", *said.models)}
    if said.picture:
        _draw(enlargers.values(), said.picture)
    for name, enlarge in enlargers.items():
        psnr, sharpness = score(enlarge, said.scenes)
        base = psnr if base is None else base
        print(f"{name[-40:]:40} {psnr:8.2f} {psnr - base:+13.2f} {sharpness:10.3f}", flush=True)


def _enlarger(name: str) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    if name == "bicubic":
        return lambda images: [_bicubic(image) for image in images]
    model = jaxdiff.load(name)

    def enlarge(images: list[np.ndarray]) -> list[np.ndarray]:
        requests = [jaxdiff.Request(prompt="", image=image) for image in images]
        return [made.pixels for made in model.generate(requests)]

    return enlarge


def _bicubic(image: np.ndarray) -> np.ndarray:
    side = SCALE * len(image)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def _draw(enlargers: Iterable[Callable], path: Path) -> None:
    """Writes a row for each enlarger, and one with the truth."""
    rng = np.random.default_rng(SEED)
    scenes = [shapes.sample(rng)[0] for _ in range(SHOWN)]
    small = [shapes.render(scene) for scene in scenes]
    rows = [enlarge(small) for enlarge in enlargers]
    rows.append([shapes.render(scene, SCALE) for scene in scenes])
    Image.fromarray(grid(np.concatenate([np.stack(row) for row in rows]), SHOWN)).save(path)


def score(enlarge: Callable, scenes: int) -> tuple[float, float]:
    """Returns the mean PSNR in dB, and the sharpness of edges."""
    rng = np.random.default_rng(SEED)
    psnr, steepness, of_truth = [], 0.0, 0.0
    for start in range(0, scenes, AT_ONCE):
        drawn = [shapes.sample(rng)[0] for _ in range(min(AT_ONCE, scenes - start))]
        truths = [shapes.render(scene, SCALE) for scene in drawn]
        for made, truth in zip(enlarge([*map(shapes.render, drawn)]), truths, strict=True):
            error = np.mean((made.astype(np.float64) - truth) ** 2)
            psnr.append(10 * np.log10(255**2 / max(error, 1e-3)))
            wanted = gradient(truth)
            steepness += gradient(made)[wanted > EDGE].sum()
            of_truth += wanted[wanted > EDGE].sum()
    return float(np.mean(psnr)), float(steepness / of_truth)


def gradient(image: np.ndarray) -> np.ndarray:
    """Returns the length of the color gradient at each pixel but the last row and column."""
    pixels = image.astype(np.float64)
    down = pixels[1:, :-1] - pixels[:-1, :-1]
    across = pixels[:-1, 1:] - pixels[:-1, :-1]
    return np.sqrt((down**2 + across**2).sum(axis=-1))


if __name__ == "__main__":
    main()
