"""Writes tests/golden/networks.npz, the outputs of diffusers' networks, for tests without torch.

    python tools/make_golden_networks.py

It runs small networks of every family with the weights of tests/networks.py, which are derived from
their names. The inputs of Stable Diffusion's networks are, too, so for these the file holds only
configs and outputs; for the transformer families, whose inputs and references are those of the
tests in tests/parity, it holds the inputs as well. Run it again only after a change in diffusers or
for a new family.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

import denoisers  # noqa: E402
import families  # noqa: E402
import networks  # noqa: E402
import references  # noqa: E402
import test_autoencoders as autoencoders  # noqa: E402
import test_flux_networks as flux  # noqa: E402
import test_mmdit_networks as mmdit  # noqa: E402
import test_pixart_network as pixart  # noqa: E402
import test_text_encoders as encoders  # noqa: E402
import test_z_image_and_sana_networks as others  # noqa: E402

# The Turbo models have the architectures of SD 2.1 and SDXL.
FAMILIES = ("SD 1.5", "SD 2.1", "SDXL", "SDXL refiner", "LCM")
CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}
AUTOENCODERS = ("Flux.2", "Qwen-Image", "Sana")
Arrays = dict[str, np.ndarray]
Case = tuple[str, dict, Arrays, Arrays]  # its name, config, inputs and outputs


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
    of_transformers = {}
    for case, config, inputs, outputs in [*of_denoisers(), *of_text_encoders(), *of_autoencoders()]:
        of_transformers[case] = config
        arrays |= {f"{case}.input.{name}": value for name, value in inputs.items()}
        arrays |= {f"{case}.output.{name}": value for name, value in outputs.items()}
    path = ROOT / "tests" / "golden" / "networks.npz"
    np.savez_compressed(
        path,
        configs=json.dumps(configs),
        transformer_configs=json.dumps(of_transformers),
        **arrays,
    )
    count = len(configs) + len(of_transformers)
    print(f"{path}: {count} networks, {path.stat().st_size} bytes")


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


def of_denoisers() -> Iterator[Case]:
    """Runs the transformers of the families."""

    def case(name: str, config: dict, inputs: Arrays, output: np.ndarray) -> Case:
        return f"{name}, transformer", config, inputs, {"output": output}

    for variant in ("Alpha", "Sigma"):
        config = pixart.VARIANTS[variant]
        inputs = pixart.inputs(config)
        yield case(f"PixArt-{variant}", config, inputs, pixart.reference(config, inputs))
    for variant in ("dev", "schnell", "klein"):
        config = flux.VARIANTS[variant]
        inputs = flux.inputs(config)
        yield case(f"FLUX {variant}", config, inputs, flux.reference(config, inputs))
    for name, config in (("SD 3", mmdit.TINY_SD3), ("SD 3.5", mmdit.TINY_SD35)):
        yield case(name, config, mmdit.SD3_INPUTS, mmdit.sd3_reference(config, mmdit.SD3_INPUTS))
    config, inputs = mmdit.TINY["Qwen"]
    yield case(
        "Qwen-Image", config, inputs, mmdit.qwen_reference(denoisers.reference(config), **inputs)
    )
    for name, config in others.TINY.items():
        yield case(name, config, others.inputs(), others.expected(config, others.inputs()))


@torch.no_grad()
def of_text_encoders() -> Iterator[Case]:
    """Runs the text encoders of the families; of the hidden states, it keeps those of prompts."""
    token_ids, mask = encoders.prompts()
    for name, (make, _, _) in encoders.ENCODERS.items():
        network = make().eval()
        config = json.loads(network.config.to_json_string())
        config["architectures"] = [type(network).__name__]
        for key, place in encoders.text_weights(network.state_dict()).items():
            place.copy_(torch.tensor(networks.weight(key, tuple(place.shape))))
        states = network(
            input_ids=torch.tensor(token_ids),
            attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True,
        ).hidden_states
        if name in encoders.T5S:
            outputs = {"hidden": states[-1]}
        else:
            outputs = {f"hidden {layer}": states[layer] for layer in networks.LAYERS}
        inputs = {"token_ids": token_ids, "mask": mask}
        seen = {key: value.numpy()[mask] for key, value in outputs.items()}
        yield f"{name}, text_encoder", config, inputs, seen


@torch.no_grad()
def of_autoencoders() -> Iterator[Case]:
    """Runs the autoencoders of the families."""
    for variant in AUTOENCODERS:
        name, options = autoencoders.VARIANTS[variant]
        network = getattr(diffusers, name)(**options).eval()
        for key, place in autoencoders.plain(network.state_dict()).items():
            place.copy_(torch.tensor(networks.weight(key, tuple(place.shape))))
        config = json.loads(network.to_json_string())
        height, width = autoencoders.SIZES.get(variant, [(2, 3)])[0]
        ours = networks.read(config)
        images = networks.drawn("images", (2, height * ours.factor, width * ours.factor, 3))
        inputs = {
            "images": np.tanh(images),
            "latents": networks.drawn("latents", (2, height, width, ours.channels)),
        }
        outputs = autoencoders.references(network, *inputs.values())
        yield f"{variant}, vae", config, inputs, outputs


if __name__ == "__main__":
    main()
