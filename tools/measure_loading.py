"""How long a full-size Stable Diffusion 1.5 takes to load, and how much memory at most.

    python tools/measure_loading.py [--stored float16] [--dtype float32] [--directory DIR]

writes a checkpoint of its structure with random weights (1.1 billion), loads its networks in a new
process, and prints one line. The files have just been written, so they come from the page cache.
It ends with 1 if more memory was needed than 1.25 times the weights and 1 GB.
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
from jaxdiff.checkpoint.components import CONFIGS, INDEX, NETWORKS, TOKENIZERS
from jaxdiff.checkpoint.single_file_configs import FAMILIES
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.text.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.weights.load import abstract_network, file_shapes, write_json

CLASSES = {
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
    "unet": (UNet2DConditionModel, UNetConfig),
    "vae": (AutoencoderKL, AutoencoderKLConfig),
}
FAMILY = FAMILIES[768]  # Stable Diffusion 1
STORED = {"float32": "F32", "float16": "F16"}
MIB = 2**20


def shapes_of(network: str) -> dict:
    """The parameters of a network of Stable Diffusion 1.5, without their values."""
    model_class, config_class = CLASSES[network]
    return abstract_network(model_class, config_class.from_json(FAMILY.configs[network]))[1]


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Writes a safetensors file tensor by tensor, which that library cannot."""
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
    """A diffusers directory of Stable Diffusion 1.5's structure; the tokenizer is the bundled."""
    write_json(directory / INDEX, FAMILY.index)
    for component, config in FAMILY.configs.items():
        (directory / component).mkdir()
        write_json(directory / component / CONFIGS[component], config)
    for network in CLASSES:
        path = directory / network / NETWORKS[network][2]
        write_random(path, file_shapes(shapes_of(network)), dtype)
    tokenizer = TOKENIZERS["text_encoder"]
    shutil.copytree(BUNDLED["shapes64"] / tokenizer, directory / tokenizer)


LOAD = """
import sys, time
import jax
from tools.measure_loading import CLASSES, shapes_of
from jaxdiff.weights.load import load_params
from jaxdiff.checkpoint.checkpoint import open_checkpoint

shapes = {network: shapes_of(network) for network in CLASSES}
jax.block_until_ready(jax.device_put(0.0))
start = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
params = {
    network: load_params(shapes[network], checkpoint.weights(network), sys.argv[2])
    for network in CLASSES
}
seconds = time.perf_counter() - start
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
print(seconds, weights, peak * 1024)
"""


def measure(directory: Path, dtype: str) -> tuple[float, int, int]:
    """Loads a checkpoint in a new process.

    Returns:
      seconds, the bytes of the weights in `dtype`, and the most bytes that were resident.
    """
    command = [sys.executable, "-c", LOAD, str(directory), dtype]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    seconds, weights, peak = said.split()[-3:]
    return float(seconds), int(weights), int(peak)


def main() -> int:
    """Writes, loads and prints; 1 if it takes too much memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stored", choices=STORED, default="float16")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--directory", help="where to write it; by default a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        write_checkpoint(Path(scratch), arguments.stored)
        seconds, weights, peak = measure(Path(scratch), arguments.dtype)
    print(
        f"{arguments.stored} on disk, {arguments.dtype} on {jax.default_backend()}: "
        f"{seconds:.1f} s, weights {weights / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB "
        f"= {peak / weights:.2f} of the weights (bound: 1.25 and 1 GB)"
    )
    return int(peak > 1.25 * weights + 1e9)


if __name__ == "__main__":
    sys.exit(main())
