"""The names of FLUX.1's transformer in Black Forest Labs' code. Imports no JAX."""

from jaxdiff.checkpoint.original.naming import (
    PARAMETERS,
    Names,
    Shapes,
    fused,
    module,
    rows,
    swapped,
)
from jaxdiff.errors import InputError

CLASS = "FluxTransformer2DModel"
HEAD_WIDTH = 128
AXES = [16, 56, 56]  # of a head's rotary embedding
GUIDANCE = "guidance_in.in_layer.weight"  # only in dev


def config(shapes: Shapes) -> dict:
    """Returns the config that a file's shapes tell; raises InputError if they do not fit."""
    channels, of_output = shapes.size("img_in.weight", 1), shapes.size("final_layer.linear.bias", 0)
    if channels != of_output:
        raise InputError(
            f"{shapes.path} takes {channels - of_output} channels of an image beside the noise; "
            "use a model that makes images from text alone"
        )
    return {
        "_class_name": CLASS,
        "attention_head_dim": HEAD_WIDTH,
        "axes_dims_rope": AXES,
        "guidance_embeds": GUIDANCE in shapes,
        "in_channels": channels,
        "joint_attention_dim": shapes.size("txt_in.weight", 1),
        "num_attention_heads": shapes.size("img_in.weight", 0) // HEAD_WIDTH,
        "num_layers": shapes.count("double_blocks"),
        "num_single_layers": shapes.count("single_blocks"),
        "patch_size": 1,
        "pooled_projection_dim": shapes.size("vector_in.in_layer.weight", 1),
    }


def names(config: dict) -> Names:
    """Yields the transformer's names."""
    width = config["num_attention_heads"] * HEAD_WIDTH
    embedders = {"timestep": "time_in", "text": "vector_in"}
    if config.get("guidance_embeds"):
        embedders["guidance"] = "guidance_in"
    for ours, theirs in embedders.items():
        yield from module(f"time_text_embed.{ours}_embedder.linear_1", f"{theirs}.in_layer")
        yield from module(f"time_text_embed.{ours}_embedder.linear_2", f"{theirs}.out_layer")
    yield from module("x_embedder", "img_in")
    yield from module("context_embedder", "txt_in")
    for i in range(config["num_layers"]):
        yield from _double_block(f"transformer_blocks.{i}", f"double_blocks.{i}")
    for i in range(config["num_single_layers"]):
        yield from _single_block(f"single_transformer_blocks.{i}", f"single_blocks.{i}", width)
    yield from swapped("norm_out.linear", "final_layer.adaLN_modulation.1")
    yield from module("proj_out", "final_layer.linear")


def _double_block(ours: str, theirs: str) -> Names:
    yield from attention(f"{ours}.attn", theirs, PARAMETERS)
    for norm, feed_forward, of in (("norm1", "ff", "img"), ("norm1_context", "ff_context", "txt")):
        yield from module(f"{ours}.{norm}.linear", f"{theirs}.{of}_mod.lin")
        yield from module(f"{ours}.{feed_forward}.net.0.proj", f"{theirs}.{of}_mlp.0")
        yield from module(f"{ours}.{feed_forward}.net.2", f"{theirs}.{of}_mlp.2")


def attention(ours: str, theirs: str, parameters: tuple[str, ...]) -> Names:
    """Yields the names of a double block's attention, in FLUX.1 or FLUX.2."""
    yield from fused(f"{ours}.to_*", f"{theirs}.img_attn.qkv", parameters)
    yield from fused(f"{ours}.add_*_proj", f"{theirs}.txt_attn.qkv", parameters)
    yield from module(f"{ours}.to_out.0", f"{theirs}.img_attn.proj", parameters)
    yield from module(f"{ours}.to_add_out", f"{theirs}.txt_attn.proj", parameters)
    yield from norms(ours, f"{theirs}.img_attn.norm")
    yield from norms(ours, f"{theirs}.txt_attn.norm", "added_")


def norms(ours: str, theirs: str, which: str = "") -> Names:
    """Yields the names of the norms of queries and keys; `which` is "added_" for the text's."""
    yield f"{ours}.norm_{which}q.weight", f"{theirs}.query_norm.scale", None
    yield f"{ours}.norm_{which}k.weight", f"{theirs}.key_norm.scale", None


def _single_block(ours: str, theirs: str, width: int) -> Names:
    """Yields the names of a single block.

    The rows of its first layer are those of the queries, the keys, the values and the MLP.
    """
    yield from module(f"{ours}.norm.linear", f"{theirs}.modulation.lin")
    for parameter in PARAMETERS:
        key = f"{theirs}.linear1.{parameter}"
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            yield f"{ours}.attn.{part}.{parameter}", key, rows(i * width, (i + 1) * width)
        yield f"{ours}.proj_mlp.{parameter}", key, rows(3 * width, None)
    yield from norms(f"{ours}.attn", f"{theirs}.norm")
    yield from module(f"{ours}.proj_out", f"{theirs}.linear2")
