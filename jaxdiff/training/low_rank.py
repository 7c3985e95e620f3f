"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685): made, merged and written for others.

A linear layer's kernel W [in, out] becomes W + alpha / rank * A B, with A [in, rank] drawn at
random and B [rank, out] zero, so that training starts from the model as it is. Adapters are a
nested dict like the parameters, of the adapted layers alone, with "lora_A" and "lora_B" for
"kernel".
"""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from jaxdiff.checkpoint.weight_files import TEXT_PREFIX

FILE = "pytorch_lora_weights.safetensors"  # where diffusers' `load_lora_weights` looks
TARGETS = {  # the layers of each network's attention, by how their dotted paths end
    "unet": (".to_q", ".to_k", ".to_v", ".to_out.0"),
    "text_encoder": (".q_proj", ".k_proj", ".v_proj", ".out_proj"),
    "text_encoder_2": (".q_proj", ".k_proj", ".v_proj", ".out_proj"),
}


def init(params: dict, rank: int, key: Array) -> dict:
    """New adapters for the attention of some networks, which change nothing yet.

    Args:
      params: of each network to be adapted ("unet", "text_encoder", "text_encoder_2"), its
        parameters as a nested dict of anything that has a `.shape`.
      rank: at least 1.
      key: what the As are drawn from, evenly within 1 / sqrt(in), as PEFT does.

    Returns:
      float32, nested like `params`.
    """
    adapters: dict = {}
    for network, tree in params.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            *module, last = (entry.key for entry in path)
            if last != "kernel" or not _name(module).endswith(TARGETS[network]):
                continue
            key, own = jax.random.split(key)
            inputs, outputs = leaf.shape
            bound = 1 / math.sqrt(inputs)
            layer = adapters
            for part in (network, *module):
                layer = layer.setdefault(part, {})
            layer["lora_A"] = jax.random.uniform(own, (inputs, rank), minval=-bound, maxval=bound)
            layer["lora_B"] = jnp.zeros((rank, outputs))
    return adapters


def merged(params: dict, adapters: dict, alpha: float) -> dict:
    """The parameters with the adapters' product added to the kernels; differentiable.

    Args:
      params: of all networks; what has no adapter is passed through.
      adapters: as `init` gives them.
      alpha: the sum is scaled by alpha / rank; 0 stands for the rank, a scale of 1.
    """
    if "lora_A" in adapters:
        scale = _scale(adapters, alpha)
        update = scale * (adapters["lora_A"] @ adapters["lora_B"])
        return {**params, "kernel": params["kernel"] + update.astype(params["kernel"].dtype)}
    return {
        name: merged(value, adapters[name], alpha) if name in adapters else value
        for name, value in params.items()
    }


def save_lora(adapters: dict, alpha: float, file: Path) -> None:
    """Writes the adapters under diffusers' and PEFT's names, whole or not at all.

    The scale is multiplied into B: a file that says no alpha has a scale of 1 for every reader,
    while of the ways to say one (metadata, a PEFT config, `.alpha`) each reader knows some.

    Args:
      adapters, alpha: as in `merged`.
      file: such as `FILE` in a directory that is there; written over.
    """
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        network, *module, part = (entry.key for entry in path)
        layer = adapters[network]
        for each in module:
            layer = layer[each]
        scale = _scale(layer, alpha) if part == "lora_B" else 1.0
        prefix = TEXT_PREFIX if network != "unet" else ""
        key = f"{network}.{prefix}{_name(module)}.{part}.weight"
        tensors[key] = np.ascontiguousarray((scale * np.asarray(leaf, np.float32)).T)
    scratch = file.with_name(f".{file.name}-{os.getpid()}")
    save_file(tensors, scratch, metadata={"format": "pt"})
    scratch.chmod(0o644)  # safetensors writes for the owner's eyes only
    scratch.replace(file)


def _scale(layer: dict, alpha: float) -> float:
    return alpha / layer["lora_A"].shape[1] if alpha else 1.0


def _name(module: list) -> str:
    return ".".join(map(str, module))
