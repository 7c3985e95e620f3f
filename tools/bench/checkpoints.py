"""The measured checkpoints: a user's, the bundled one, or one with random weights.

    python -m tools.bench.checkpoints sd15|sdxl|flux1-dev DIR

writes one with random weights: the published architecture at full size, in diffusers' layout and
bfloat16.
"""

import json
import os
import string
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxdiff import cache
from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.checkpoint.component import INDEX, TOKENIZER_FILES, config_file
from jaxdiff.checkpoint.json_files import read_json, write_json
from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.families import FAMILIES
from tools import random_weights
from tools.bench import flux_dev

FULL_SIZE = {  # `model_index.json` and the configs
    "sd15": (CONTENTS[768].index, CONTENTS[768].configs),
    "sdxl": (CONTENTS[2048].index, CONTENTS[2048].configs),
    "flux1-dev": (flux_dev.INDEX, flux_dev.CONFIGS),
}
TOKENS, T5_TOKENS = 77, 512  # per prompt; the bundled tokenizer's own limit is 24
ROOT = Path(__file__).parents[2]


def directory(model: str) -> Path:
    """Returns the diffusers directory of "shapes64", a path, or a `FULL_SIZE` (written if new)."""
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

    index, configs = FULL_SIZE[model]
    family = FAMILIES[index["_class_name"]]
    built = family.networks()
    parsed = {name: configs[name] for name in family.components}
    networks = built.build(built.read_configs(parsed), index).networks
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        write_json(new / INDEX, index)
        for name, config in configs.items():
            (new / name).mkdir()
            write_json(new / name / config_file(name), config)
        for name, component in family.components.items():
            if component.tokenizer:
                is_t5 = component.class_name == "T5EncoderModel"
                (_write_t5_tokenizer if is_t5 else _write_clip_tokenizer)(new / component.tokenizer)
            shapes = file_shapes(networks[name].shapes)
            shapes = {_key(key, component.prefix): shape for key, shape in shapes.items()}
            random_weights.write(new / name / component.weights_file, shapes, "bfloat16")
        new.rename(target)


def _key(key: str, prefix: str) -> str:
    """Returns transformers' key: the text projection alone has no prefix."""
    return key if key.startswith("text_projection.") else prefix + key


def _write_clip_tokenizer(folder: Path) -> None:
    bundled = BUNDLED["shapes64"] / "tokenizer"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (bundled / name).is_file():
            (folder / name).write_bytes((bundled / name).read_bytes())
    config = read_json(folder / "tokenizer_config.json") | {"model_max_length": TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_t5_tokenizer(folder: Path) -> None:
    """Writes one of single characters."""
    from transformers import T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(piece, -4.0) for piece in ("▁", *string.ascii_letters, *string.digits)]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS).save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
