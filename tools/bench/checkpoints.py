"""The measured checkpoints: a user's, the bundled one, or one with random weights.

    python -m tools.bench.checkpoints sd15|sdxl DIR

writes one with random weights: the published architecture at full size, in diffusers' layout and
float16.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxdiff import cache
from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.checkpoint.component import INDEX, TOKENIZER_FILES, config_file
from jaxdiff.checkpoint.json_files import read_json, write_json
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.families import FAMILIES

FULL_SIZE = {"sd15": CONTENTS[768], "sdxl": CONTENTS[2048]}
TOKENS = 77  # per prompt; the bundled tokenizer's own limit is 24
ROOT = Path(__file__).parents[2]


def directory(model: str) -> Path:
    """Returns the diffusers directory of "shapes64", a path, "sd15" or "sdxl" (written if new)."""
    if model not in FULL_SIZE:
        return BUNDLED.get(model) or Path(model)
    kept = cache.directory() / "bench"
    if not (kept / model).exists():
        # In a separate process, because JAX would hold the accelerator in this one.
        command = [sys.executable, "-m", "tools.bench.checkpoints", model, str(kept / model)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return kept / model


def write(model: str, target: Path) -> None:
    """Writes a full-size checkpoint atomically."""
    from jaxdiff.weights.load import file_shapes

    contents = FULL_SIZE[model]
    family = FAMILIES[contents.index["_class_name"]]
    built = family.networks()
    parsed = {name: contents.configs[name] for name in family.components}
    networks = built.build(built.read_configs(parsed), contents.index).networks
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        write_json(new / INDEX, contents.index)
        for name, config in contents.configs.items():
            (new / name).mkdir()
            write_json(new / name / config_file(name), config)
        for name, component in family.components.items():
            if component.tokenizer:
                _write_tokenizer(new / component.tokenizer)
            shapes = file_shapes(networks[name].shapes)
            shapes = {_key(key, component.prefix): shape for key, shape in shapes.items()}
            _write_weights(new / name / component.weights_file, shapes)
        new.rename(target)


def _key(key: str, prefix: str) -> str:
    """Returns transformers' key: the text projection alone has no prefix."""
    return key if key.startswith("text_projection.") else prefix + key


def _write_tokenizer(folder: Path) -> None:
    bundled = BUNDLED["shapes64"] / "tokenizer"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (bundled / name).is_file():
            (folder / name).write_bytes((bundled / name).read_bytes())
    config = read_json(folder / "tokenizer_config.json") | {"model_max_length": TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes random weights tensor by tensor, because all of XL's would fill the memory.

    The safetensors library cannot do this. The weights are scaled to keep activations near 1, so
    that nothing overflows.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * np.dtype(np.float16).itemsize
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header)
    text += " " * (-len(text) % 8)  # aligns the tensors to words, because they are memory-mapped
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
