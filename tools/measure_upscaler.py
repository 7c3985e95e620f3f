"""Measures GAN upscalers: their speed beside PyTorch's, and the seams of their tiles.

Weights are random, of the published sizes. Speed is in megapixels of the result per second; each
round times one batch of either, in turn, of as many images as jaxdiff computes at once. The seam is
the largest difference between an image that was enlarged in tiles and the same one in one piece, in
8-bit steps.

    python -m tools.measure_upscaler speed
    python -m tools.measure_upscaler seams
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch

import jaxdiff
from jaxdiff.images import tiles
from jaxdiff.worlds import shapes
from tools.bench.torch_upscalers import RRDBNet, SRVGGNetCompact

NETWORKS = {  # published ones of these sizes
    "compact, 16 (animevideov3)": lambda: SRVGGNetCompact(convs=16),
    "compact, 32 (general-x4v3)": lambda: SRVGGNetCompact(convs=32),
    "RRDB, 6 blocks (anime 6B)": lambda: RRDBNet(blocks=6),
    "RRDB, 23 blocks (x4plus)": lambda: RRDBNet(blocks=23),
}
SIDES = 128, 128  # of the images of the speed test
LARGE = 320, 320  # of the image with seams: four tiles
ROUNDS = 3


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["speed", "seams"])
    said = parser.parse_args()
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        network = make().eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.safetensors"
            safetensors.torch.save_file(network.state_dict(), path)
            print(f"{name:28}", globals()[said.what](path, network), flush=True)


def speed(path: Path, network: torch.nn.Module) -> str:
    """Returns the megapixels per second of both, and the ratio with its spread."""
    model, image = jaxdiff.load(path), _picture(*SIDES)
    requests = [jaxdiff.Request(prompt="", image=image)]
    requests *= model.slots(model.prepare(requests[0]), batch_size=1)
    seen = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    seen = seen.repeat(len(requests), 1, 1, 1)

    def ours() -> None:
        model.generate(requests)

    def theirs() -> None:
        with torch.no_grad():
            network(seen)

    for each in (ours, theirs):  # compiles, and fills caches
        each()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(ROUNDS)]
    megapixels = len(requests) * 16 * SIDES[0] * SIDES[1] / 1e6
    rates = [megapixels / statistics.median(column) for column in zip(*pairs, strict=True)]
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    return (
        f"jaxdiff {rates[0]:.3f}, PyTorch {rates[1]:.3f} megapixels/s; "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def seams(path: Path, _: torch.nn.Module) -> str:
    """Returns the largest and the mean difference that tiles make."""
    image = _picture(*LARGE)
    tiled = _enlarged(jaxdiff.load(path), image).astype(int)
    with mock.patch.object(tiles, "SIDE", max(LARGE)):
        whole = _enlarged(jaxdiff.load(path), image)
    difference = np.abs(tiled - whole)
    return f"largest {difference.max()}, mean {difference.mean():.5f} of 255"


def _enlarged(model, image: np.ndarray) -> np.ndarray:
    return model.generate([jaxdiff.Request(prompt="", image=image)])[0].pixels


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _picture(height: int, width: int) -> np.ndarray:
    """Returns scenes of the shapes world with noise, side by side."""
    rng = np.random.default_rng(0)
    rows, columns = -(-height // 64), -(-width // 64)
    scenes = [[shapes.render(shapes.sample(rng)[0]) for _ in range(columns)] for _ in range(rows)]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in scenes])[:height, :width]
    noise = rng.normal(0, 8, whole.shape)
    return np.clip(np.round(whole + noise), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
