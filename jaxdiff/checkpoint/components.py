"""The parts of a checkpoint in the diffusers layout, and what their files are called."""

import json
from pathlib import Path

from jaxdiff.errors import InputError

NETWORKS = {  # component: (its library, its class, its file of weights)
    "text_encoder": ("transformers", "CLIPTextModel", "model.safetensors"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "model.safetensors"),
    "unet": ("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model.safetensors"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model.safetensors"),
}
INDEX = "model_index.json"
CONFIGS = {
    **{component: "config.json" for component in NETWORKS},
    "scheduler": "scheduler_config.json",
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
MAX_JSON_BYTES = 64_000_000


def read_json(path: Path) -> dict:
    """The JSON object in the file at `path`; raises InputError if there is none."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_JSON_BYTES))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the checkpoint again") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; copy it again")
    return value
