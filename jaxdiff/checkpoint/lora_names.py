"""Layers by the names that they have outside diffusers. Imports no JAX.

LoRA files may name a layer as the code of the model's authors does, whose layers often do the work
of several here. There is a table for each model, with `*` for a block's number; how many blocks
there are, a checkpoint's own keys say.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Layer(NamedTuple):
    """What a name in a LoRA file stands for.

    Attributes:
      keys: our keys of the weights, whose rows together are the rows of the file's layer.
      halves_swapped: whether the first half of the file's rows are our last.
    """

    keys: tuple[str, ...]
    halves_swapped: bool = False


def layers_of(table: Mapping[str, Layer], keys: Collection[str]) -> dict[str, Layer]:
    """Returns the layers of a table that a network with these keys has, by their names."""
    numbers = sorted({part for key in keys for part in key.split(".") if part.isdecimal()})
    layers = {}
    for name, layer in table.items():
        for number in numbers if "*" in name else [""]:
            ours = tuple(f"{key}.weight".replace("*", number) for key in layer.keys)
            if all(key in keys for key in ours):
                layers[name.replace("*", number)] = layer._replace(keys=ours)
    return layers


def _rows(*keys: str) -> Layer:
    return Layer(keys)


_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_IMAGE_QKV = tuple(f"{_DOUBLE}.attn.to_{letter}" for letter in "qkv")
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.add_{letter}_proj" for letter in "qkv")
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.to_{letter}" for letter in "qkv")
_FINAL_LAYER = {
    # Shift, then scale; diffusers has them the other way round.
    "final_layer.adaLN_modulation.1": Layer(("norm_out.linear",), halves_swapped=True),
    "final_layer.linear": _rows("proj_out"),
}
_BOTH_FLUX = {
    "img_in": _rows("x_embedder"),
    "txt_in": _rows("context_embedder"),
    "double_blocks.*.img_attn.qkv": _rows(*_IMAGE_QKV),
    "double_blocks.*.img_attn.proj": _rows(f"{_DOUBLE}.attn.to_out.0"),
    "double_blocks.*.txt_attn.qkv": _rows(*_TEXT_QKV),
    "double_blocks.*.txt_attn.proj": _rows(f"{_DOUBLE}.attn.to_add_out"),
    **_FINAL_LAYER,
}


def _mlp(first: str, second: str, ours: str) -> dict[str, Layer]:
    return {first: _rows(f"{ours}.linear_1"), second: _rows(f"{ours}.linear_2")}


def _embedder(name: str, ours: str) -> dict[str, Layer]:
    return _mlp(f"{name}.in_layer", f"{name}.out_layer", ours)


# Black Forest Labs' names, which kohya's files have with underscores.
FLUX = {
    **_BOTH_FLUX,
    **_embedder("time_in", "time_text_embed.timestep_embedder"),
    **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    **_embedder("vector_in", "time_text_embed.text_embedder"),
    "double_blocks.*.img_mod.lin": _rows(f"{_DOUBLE}.norm1.linear"),
    "double_blocks.*.txt_mod.lin": _rows(f"{_DOUBLE}.norm1_context.linear"),
    "double_blocks.*.img_mlp.0": _rows(f"{_DOUBLE}.ff.net.0.proj"),
    "double_blocks.*.img_mlp.2": _rows(f"{_DOUBLE}.ff.net.2"),
    "double_blocks.*.txt_mlp.0": _rows(f"{_DOUBLE}.ff_context.net.0.proj"),
    "double_blocks.*.txt_mlp.2": _rows(f"{_DOUBLE}.ff_context.net.2"),
    "single_blocks.*.modulation.lin": _rows(f"{_SINGLE}.norm.linear"),
    "single_blocks.*.linear1": _rows(*_SINGLE_QKV, f"{_SINGLE}.proj_mlp"),
    "single_blocks.*.linear2": _rows(f"{_SINGLE}.proj_out"),
    # XLabs' names: 1 is the image's stream and 2 the text's.
    "double_blocks.*.qkv_lora1": _rows(*_IMAGE_QKV),
    "double_blocks.*.proj_lora1": _rows(f"{_DOUBLE}.attn.to_out.0"),
    "double_blocks.*.qkv_lora2": _rows(*_TEXT_QKV),
    "double_blocks.*.proj_lora2": _rows(f"{_DOUBLE}.attn.to_add_out"),
    "single_blocks.*.qkv": _rows(*_SINGLE_QKV),
    "single_blocks.*.proj": _rows(f"{_SINGLE}.proj_out"),
}
FLUX_2 = {
    **_BOTH_FLUX,
    **_embedder("time_in", "time_guidance_embed.timestep_embedder"),
    **_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    "double_stream_modulation_img.lin": _rows("double_stream_modulation_img.linear"),
    "double_stream_modulation_txt.lin": _rows("double_stream_modulation_txt.linear"),
    "single_stream_modulation.lin": _rows("single_stream_modulation.linear"),
    "double_blocks.*.img_mlp.0": _rows(f"{_DOUBLE}.ff.linear_in"),
    "double_blocks.*.img_mlp.2": _rows(f"{_DOUBLE}.ff.linear_out"),
    "double_blocks.*.txt_mlp.0": _rows(f"{_DOUBLE}.ff_context.linear_in"),
    "double_blocks.*.txt_mlp.2": _rows(f"{_DOUBLE}.ff_context.linear_out"),
    "single_blocks.*.linear1": _rows(f"{_SINGLE}.attn.to_qkv_mlp_proj"),
    "single_blocks.*.linear2": _rows(f"{_SINGLE}.attn.to_out"),
}
Z_IMAGE = {
    "x_embedder": _rows("all_x_embedder.2-1"),
    "final_layer.linear": _rows("all_final_layer.2-1.linear"),
    "final_layer.adaLN_modulation.1": _rows("all_final_layer.2-1.adaLN_modulation.1"),
} | {
    f"{blocks}.*.attention.{name}": _rows(*(f"{blocks}.*.attention.{key}" for key in keys))
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for name, keys in {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}.items()
}
STABLE_DIFFUSION_3 = {
    "x_embedder.proj": _rows("pos_embed.proj"),
    **_mlp("t_embedder.mlp.0", "t_embedder.mlp.2", "time_text_embed.timestep_embedder"),
    **_mlp("y_embedder.mlp.0", "y_embedder.mlp.2", "time_text_embed.text_embedder"),
    "joint_blocks.*.x_block.attn.qkv": _rows(*_IMAGE_QKV),
    "joint_blocks.*.x_block.attn.proj": _rows(f"{_DOUBLE}.attn.to_out.0"),
    "joint_blocks.*.x_block.attn2.qkv": _rows(*(f"{_DOUBLE}.attn2.to_{x}" for x in "qkv")),
    "joint_blocks.*.x_block.attn2.proj": _rows(f"{_DOUBLE}.attn2.to_out.0"),
    "joint_blocks.*.x_block.mlp.fc1": _rows(f"{_DOUBLE}.ff.net.0.proj"),
    "joint_blocks.*.x_block.mlp.fc2": _rows(f"{_DOUBLE}.ff.net.2"),
    "joint_blocks.*.x_block.adaLN_modulation.1": _rows(f"{_DOUBLE}.norm1.linear"),
    "joint_blocks.*.context_block.attn.qkv": _rows(*_TEXT_QKV),
    "joint_blocks.*.context_block.attn.proj": _rows(f"{_DOUBLE}.attn.to_add_out"),
    "joint_blocks.*.context_block.mlp.fc1": _rows(f"{_DOUBLE}.ff_context.net.0.proj"),
    "joint_blocks.*.context_block.mlp.fc2": _rows(f"{_DOUBLE}.ff_context.net.2"),
    "joint_blocks.*.context_block.adaLN_modulation.1": _rows(f"{_DOUBLE}.norm1_context.linear"),
    **_FINAL_LAYER,
}
