"""Creates, merges and saves low-rank adapters (Hu et al., 2021, arXiv:2106.09685).

A linear layer's kernel W [in, out] becomes W + alpha / rank * A B. A [in, rank] is initialized
randomly and B [rank, out] to zero, so that training starts from the unchanged model. Adapters are a
nested dict like the parameters, but only of the adapted layers, with "lora_A" and "lora_B" instead
of "kernel".
"""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from jaxdiff.families.components import TEXT_PREFIX

FILE = "pytorch_lora_weights.safetensors"  # where diffusers' `load_lora_weights` looks
DENOISERS = ("unet", "transformer")
# The adapted layers, by the ends of their dotted paths: the attention's. A transformer's blocks may
# have layers of their own for the text ("add").
OF_DENOISERS = (
    *(".to_q", ".to_k", ".to_v", ".to_out.0"),
    *(".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out"),
)
OF_CLIP = (".q_proj", ".k_proj", ".v_proj", ".out_proj")  # other encoders are never adapted


def init(params: dict, rank: int, key: Array) -> dict:
    """Creates adapters for the attention of some networks that initially have no effect.

    Args:
      params: the parameters of each network to adapt by component, as nested dicts whose leaves
        have a `.shape`.
      rank: at least 1.
      key: the random key for the A matrices, which are uniform in +-1 / sqrt(in), as in PEFT.

    Returns:
      float32 adapters, nested like `params`.
    """
    adapters: dict = {}
    for network, tree in params.items():
        targets = OF_DENOISERS if network in DENOISERS else OF_CLIP
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            *module, last = (entry.key for entry in path)
            if last != "kernel" or not _name(module).endswith(targets):
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
    """Returns the parameters with the adapters added to the kernels; differentiable.

    Args:
      params: of all networks; parameters without an adapter are returned unchanged.
      adapters: from `init`.
      alpha: the product A B is scaled by alpha / rank; 0 sets alpha to the rank, a scale of 1.
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
    """Writes the adapters atomically, under the names that diffusers and PEFT use.

    The scale is multiplied into B. Without an alpha in the file every reader uses a scale of 1,
    whereas no single way to store one (metadata, a PEFT config, `.alpha`) works in all readers.

    Args:
      adapters, alpha: as in `merged`.
      file: usually `FILE`, in an existing directory; overwritten if it exists.
    """
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        network, *module, part = (entry.key for entry in path)
        layer = adapters[network]
        for each in module:
            layer = layer[each]
        scale = _scale(layer, alpha) if part == "lora_B" else 1.0
        prefix = "" if network in DENOISERS else TEXT_PREFIX
        key = f"{network}.{prefix}{_name(module)}.{part}.weight"
        tensors[key] = np.ascontiguousarray((scale * np.asarray(leaf, np.float32)).T)
    scratch = file.with_name(f".{file.name}-{os.getpid()}")
    save_file(tensors, scratch, metadata={"format": "pt"})
    scratch.chmod(0o644)  # safetensors makes files readable only by their owner
    scratch.replace(file)


def _scale(layer: dict, alpha: float) -> float:
    return alpha / layer["lora_A"].shape[1] if alpha else 1.0


def _name(module: list) -> str:
    return ".".join(map(str, module))
