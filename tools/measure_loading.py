"""Measures load time and peak memory of full-size networks with random weights.

    python -m tools.measure_loading [--network flux] [--blocks 10,20] [--stored float8_e4m3fn]
        [--dtype bfloat16] [--directory DIR]

writes the networks of Stable Diffusion 1.5 (1.1 billion weights), or the transformer of FLUX.1 dev
(11.9 billion; fewer with fewer blocks, which keep their width), loads them in a new process, and
prints one line. The files were just written, so they may come from the page cache. The exit code is
1 if the peak exceeds 1.25 times the weights plus 1 GB.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.families import FAMILIES
from jaxdiff.weights.load import file_shapes, load_params, places
from jaxdiff.weights.network import abstract_network
from tools import random_weights

FLUX_DEV = {"guidance_embeds": True}  # the class's defaults are the rest
MIB = 2**20


def networks(name: str, blocks: str) -> dict[str, tuple[Component, dict]]:
    """Returns each network's files and the shapes of its parameters."""
    if name == "flux":
        family = FAMILIES["FluxPipeline"]
        double, single = map(int, blocks.split(","))
        parsed = {"transformer": FLUX_DEV | {"num_layers": double, "num_single_layers": single}}
    else:
        family, configs = FAMILIES["StableDiffusionPipeline"], CONTENTS[768].configs
        parsed = {component: configs[component] for component in family.components}
    made = family.networks()
    return {
        component: (
            family.components[component],
            abstract_network(made.module(component, config), config)[1],
        )
        for component, config in made.read_configs(parsed).items()
    }


def load(directory: str, dtype: str, name: str, blocks: str) -> None:
    """Loads the networks of a directory; prints the seconds, the weights' bytes and the peak."""
    jax.block_until_ready(jax.device_put(0.0))
    start = time.perf_counter()
    params = {
        component: load_params(
            places(shapes, dtype), read_weights(stored, Path(directory, f"{component}.safetensors"))
        )
        for component, (stored, shapes) in networks(name, blocks).items()
    }
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if "VmHWM" in line)
    print(seconds, weights, peak * 1024)


def main() -> int:
    """Writes, loads in a new process and prints; returns 1 if that takes too much memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=("sd15", "flux"), default="sd15")
    parser.add_argument("--blocks", default="19,38", help="of FLUX.1: double and single ones")
    parser.add_argument("--stored", choices=random_weights.STORED, default="float16")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--directory", help="where to write the checkpoint (default: a temporary directory)"
    )
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=said.directory) as scratch:
        for component, (_, shapes) in networks(said.network, said.blocks).items():
            random_weights.write(
                Path(scratch, f"{component}.safetensors"), file_shapes(shapes), said.stored
            )
        call = f"load({scratch!r}, {said.dtype!r}, {said.network!r}, {said.blocks!r})"
        command = [sys.executable, "-c", f"from tools.measure_loading import load; {call}"]
        root = Path(__file__).parents[1]
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
        seconds, weights, peak = map(float, found.stdout.split()[-3:])
    print(
        f"{said.network}, {said.stored} on disk, {said.dtype} on {jax.default_backend()}: "
        f"{seconds:.1f} s, weights {weights / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB "
        f"= {peak / weights:.2f} times the weights (limit: 1.25 times plus 1 GB)"
    )
    return int(peak > 1.25 * weights + 1e9)


if __name__ == "__main__":
    sys.exit(main())
