"""Measures what weights of 8 bits save and change: bytes, and PSNR against float32.

python -m tools.measure_quantization --model shapes64
"""

import argparse

import jax
import numpy as np

import jaxdiff
from jaxdiff.request import Request
from jaxdiff.worlds import shapes

PROMPTS, SEED = 64, 30_000_000  # a seed that no recipe uses
SETTINGS = [
    {"dtype": dtype, "weights": weights}
    for dtype in ("float32", "bfloat16")
    for weights in ("full", "int8", "fp8", "w8a8")
]


def main() -> None:
    """Prints a row for each dtype and kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="shapes64")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    said = parser.parse_args()
    rng = np.random.default_rng(SEED)
    requests = [Request(prompt=shapes.sample(rng)[1], seed=seed) for seed in range(said.prompts)]
    truth = None
    print(f"{'dtype':10} {'weights':8} {'MB':>8} {'PSNR, median':>13} {'5% below':>9}")
    for setting in SETTINGS:
        model = jaxdiff.load(said.model, **setting)
        made = np.stack([image.pixels for image in model.generate(requests)]).astype(np.float64)
        truth = made if truth is None else truth
        error = np.maximum(((made - truth) ** 2).mean(axis=(1, 2, 3)), 1e-3)
        psnr = 10 * np.log10(255**2 / error)
        print(
            f"{setting['dtype']:10} {setting['weights']:8} {weights_bytes(model) / 1e6:8.2f} "
            f"{np.median(psnr):13.1f} {np.quantile(psnr, 0.05):9.1f}",
            flush=True,
        )


def weights_bytes(model: jaxdiff.TextToImage) -> int:
    """Returns the bytes of the denoiser and the text encoders on the device."""
    sampler = model._sampler
    networks = sampler._weights.denoisers, sampler._denoisers[0].prompts.params
    return sum(leaf.nbytes for leaf in jax.tree.leaves(networks))


if __name__ == "__main__":
    main()
