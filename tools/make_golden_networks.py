"""Writes tests/golden/networks.npz, the outputs of diffusers' networks, for tests without torch.

    python tools/make_golden_networks.py

It runs small networks of every family with the weights and inputs of tests/networks.py, which are
derived from their names, so the file holds only configs and outputs. Run it again only after a
change in diffusers or for a new family.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

import families  # noqa: E402
import networks  # noqa: E402
import references  # noqa: E402

# The Turbo models have the architectures of SD 2.1 and SDXL.
FAMILIES = ("SD 1.5", "SD 2.1", "SDXL", "SDXL refiner", "LCM")
CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}


def main() -> None:
    """Runs every network and writes the file."""
    configs, arrays = {}, {}
    for family in FAMILIES:
        for network, network_class in CLASSES.items():
            if (settings := getattr(families.FAMILIES[family], network)) is None:
                continue
            reference, config = build(network_class, settings)
            if config in configs.values():
                continue
            case = f"{family}, {network}"
            configs[case] = config
            found = references.outputs(reference, networks.inputs(network, config))
            arrays |= {f"{case}.{name}": value for name, value in found.items()}
    path = ROOT / "tests" / "golden" / "networks.npz"
    np.savez_compressed(path, configs=json.dumps(configs), **arrays)
    print(f"{path}: {len(configs)} networks, {path.stat().st_size} bytes")


def build(network_class, settings: dict):
    """Returns the network with its generated weights, and the config that is saved with them."""
    if issubclass(network_class, transformers.PreTrainedModel):
        reference = network_class(transformers.CLIPTextConfig(**settings))
        config = json.loads(reference.config.to_json_string())
        config["architectures"] = [network_class.__name__]
    else:
        reference = network_class(**settings)
        config = json.loads(reference.to_json_string())
    weights = {
        key: torch.tensor(networks.weight(key.removeprefix("text_model."), tuple(value.shape)))
        for key, value in reference.state_dict().items()
    }
    reference.load_state_dict(weights)
    return reference.eval(), config


if __name__ == "__main__":
    main()
