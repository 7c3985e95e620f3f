"""Makes a ControlNet to train for a model (Zhang et al., 2023, arXiv:2302.05543)."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.component import CONFIG
from jaxdiff.checkpoint.controlnet import CONTROLNET
from jaxdiff.checkpoint.json_files import write_json
from jaxdiff.errors import InputError
from jaxdiff.models.controlnet import ControlNetConfig, ControlNetModel
from jaxdiff.models.unet import UNetConfig
from jaxdiff.training.components import Components
from jaxdiff.training.loop import Params
from jaxdiff.weights.load import name_of
from jaxdiff.weights.save import save_params

COMPONENT = ControlNetConfig.component
# Layers that are zero at first, so that training starts from the unchanged model (section 3.1).
ZERO_AT_FIRST = (
    *("controlnet_down_blocks.", "controlnet_mid_block."),
    "controlnet_cond_embedding.conv_out.",
)


def added(parts: Components, changes: Mapping, seed: int, *, remat: bool) -> Components:
    """Adds a new ControlNet, which begins as a copy of the U-Net's first half.

    Args:
      parts: a model with a U-Net.
      changes: the keys of the ControlNet's `config.json` that differ from the U-Net's.
      seed: of the layers that the U-Net does not have.
      remat: whether gradients recompute activations.

    Raises:
      InputError: if the model has no U-Net, or a key cannot be used or does not fit it.
    """
    unet = parts.model.configs[parts.model.denoiser.component]
    if not isinstance(unet, UNetConfig):
        raise InputError('method = "controlnet" works with Stable Diffusion 1, 2 and XL only')
    known = {field.name for field in fields(ControlNetConfig)}
    config = {
        **{key: value for key, value in unet.to_json().items() if key in known},
        "in_channels": parts.model.codec.channels,  # a U-Net for inpainting has more
        **changes,
    }
    control = parts.family.networks().control(parts.model.configs, config, remat=remat)
    read = ControlNetConfig.from_json(config)
    state = nnx.split(ControlNetModel(read, rngs=nnx.Rngs(seed)))[1]
    copied = {
        name_of(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts.params["unet"])
    }

    def at_first(path, leaf: Array) -> Array:
        name = name_of(path)
        if name.startswith(ZERO_AT_FIRST):
            return jnp.zeros_like(leaf)
        same = copied.get(name)
        return leaf if same is None or same.shape != leaf.shape else same

    params = jax.tree_util.tree_map_with_path(at_first, nnx.to_pure_dict(state))
    return replace(
        parts,
        params={**parts.params, COMPONENT: params},
        control=control,
        control_config=read,
    )


def save(directory: Path, config: ControlNetConfig, params: Params, dtype) -> None:
    """Writes a ControlNet's folder, as diffusers reads it.

    Raises:
      ValueError: if a weight overflows `dtype`.
    """
    directory.mkdir(exist_ok=True)
    write_json(directory / CONFIG, config.to_json())
    save_params(params, directory / CONTROLNET.weights_file, dtype)
