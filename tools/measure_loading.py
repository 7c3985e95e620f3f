"""Measures load time and peak memory of a full-size Stable Diffusion 1.5.

    python tools/measure_loading.py [--stored float16] [--dtype float32] [--directory DIR]

writes a checkpoint with its architecture and 1.1 billion random weights, loads its networks in a
new process, and prints one line. The files were just written, so they come from the page cache.
The exit code is 1 if the peak exceeds 1.25 times the weights plus 1 GB.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.checkpoint.component import INDEX, config_file
from jaxdiff.checkpoint.json_files import write_json
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION
from jaxdiff.weights.load import file_shapes

COMPONENTS = STABLE_DIFFUSION.components
CONTENT = CONTENTS[768]  # Stable Diffusion 1
STORED = {"float32": "F32", "float16": "F16"}
MIB = 2**20


def all_shapes() -> dict[str, dict]:
    """Returns the shapes of the parameters of Stable Diffusion 1.5, by network."""
    networks = STABLE_DIFFUSION.networks()
    parsed = {name: CONTENT.configs[name] for name in COMPONENTS}
    model = networks.build(networks.read_configs(parsed), CONTENT.index)
    return {name: network.shapes for name, network in model.networks.items()}


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Writes a safetensors file tensor by tensor, which the safetensors library cannot."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[key] = {"dtype": STORED[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            random.standard_normal(shape, np.float32).astype(dtype).tofile(file)


def write_checkpoint(directory: Path, dtype: str) -> None:
    """Writes a diffusers directory like Stable Diffusion 1.5, with the bundled tokenizer."""
    write_json(directory / INDEX, CONTENT.index)
    for name, config in CONTENT.configs.items():
        (directory / name).mkdir()
        write_json(directory / name / config_file(name), config)
    for name, shapes in all_shapes().items():
        path = directory / name / COMPONENTS[name].weights_file
        write_random(path, file_shapes(shapes), dtype)
    tokenizer = COMPONENTS["text_encoder"].tokenizer
    shutil.copytree(BUNDLED["shapes64"] / tokenizer, directory / tokenizer)


LOAD = """
import sys, time
import jax
from tools.measure_loading import all_shapes
from jaxdiff.weights.load import load_params, places
from jaxdiff.families import open_checkpoint

shapes = all_shapes()
jax.block_until_ready(jax.device_put(0.0))
start = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
params = {
    network: load_params(places(shapes[network], sys.argv[2]), checkpoint.weights(network))
    for network in shapes
}
seconds = time.perf_counter() - start
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
print(seconds, weights, peak * 1024)
"""


def measure(directory: Path, dtype: str) -> tuple[float, int, int]:
    """Loads a checkpoint in a new process.

    Returns:
      the seconds, the bytes of the weights in `dtype`, and the peak resident bytes.
    """
    command = [sys.executable, "-c", LOAD, str(directory), dtype]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    seconds, weights, peak = said.split()[-3:]
    return float(seconds), int(weights), int(peak)


def main() -> int:
    """Writes, loads and prints; returns 1 if loading takes too much memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stored", choices=STORED, default="float16")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--directory", help="where to write the checkpoint (default: a temporary directory)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        write_checkpoint(Path(scratch), arguments.stored)
        seconds, weights, peak = measure(Path(scratch), arguments.dtype)
    print(
        f"{arguments.stored} on disk, {arguments.dtype} on {jax.default_backend()}: "
        f"{seconds:.1f} s, weights {weights / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB "
        f"= {peak / weights:.2f} times the weights (limit: 1.25 times plus 1 GB)"
    )
    return int(peak > 1.25 * weights + 1e9)


if __name__ == "__main__":
    sys.exit(main())
