"""The checkpoints that are measured: a user's, the bundled one, or one of random weights.

    python -m tools.bench.checkpoints sd15|sdxl

writes the last: the published architecture at full size, a diffusers directory in float16.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.checkpoint.components import (
    CONFIGS,
    INDEX,
    NETWORKS,
    TOKENIZER_FILES,
    TOKENIZERS,
    read_json,
)
from jaxdiff.checkpoint.single_file_configs import FAMILIES
from jaxdiff.checkpoint.sources import cache_directory
from jaxdiff.checkpoint.weight_files import TEXT_PREFIX

FULL_SIZE = {"sd15": FAMILIES[768], "sdxl": FAMILIES[2048]}
TOKENS = 77  # of a prompt; the bundled tokenizer itself says 24
ROOT = Path(__file__).parents[2]


def directory(model: str) -> Path:
    """The diffusers directory of "shapes64", of a path, or of "sd15" or "sdxl", written if new."""
    if model not in FULL_SIZE:
        return BUNDLED.get(model) or Path(model)
    cache = cache_directory() / "bench"
    if not (cache / model).exists():
        # In a process of its own: JAX would keep this one's accelerator.
        command = [sys.executable, "-m", "tools.bench.checkpoints", model, str(cache / model)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return cache / model


def write(model: str, target: Path) -> None:
    """Writes a full-size checkpoint, whole or not at all."""
    from jaxdiff.families.networks import CONFIGS as CONFIG_CLASSES
    from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL
    from jaxdiff.models.text import clip
    from jaxdiff.models.unet import UNet2DConditionModel
    from jaxdiff.weights.load import abstract_network, file_shapes, write_json

    family = FULL_SIZE[model]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        write_json(new / INDEX, family.index)
        for component, said in family.configs.items():
            (new / component).mkdir()
            write_json(new / component / CONFIGS[component], said)
            if component not in NETWORKS:
                continue
            config = CONFIG_CLASSES[component].from_json(said)
            classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
            network = classes.get(component) or clip.network(config)
            shapes = file_shapes(abstract_network(network, config)[1])
            if component in TOKENIZERS:
                _write_tokenizer(new / TOKENIZERS[component])
                shapes = {_text_key(key): shape for key, shape in shapes.items()}
            _write_weights(new / component / NETWORKS[component][2], shapes)
        new.rename(target)


def _text_key(key: str) -> str:
    """As transformers has it: the projection alone is no part of the "text_model"."""
    return key if key.startswith("text_projection.") else TEXT_PREFIX + key


def _write_tokenizer(folder: Path) -> None:
    bundled = BUNDLED["shapes64"] / "tokenizer"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (bundled / name).is_file():
            (folder / name).write_bytes((bundled / name).read_bytes())
    config = read_json(folder / "tokenizer_config.json") | {"model_max_length": TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random weights tensor by tensor, as safetensors' own writer cannot: XL's would fill memory.

    They have the size that keeps activations near 1, so that nothing overflows.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * np.dtype(np.float16).itemsize
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header)
    text += " " * (-len(text) % 8)  # tensors are read where they lie, so they begin at a word
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        for key, shape in shapes.items():
            numbers = random.standard_normal(shape, np.float32)
            if len(shape) == 1:
                numbers = 0.1 * numbers + (0 if key.endswith("bias") else 1)
            else:
                numbers /= np.sqrt(np.prod(shape[1:]), dtype=np.float32)
            numbers.astype(np.float16).tofile(file)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
