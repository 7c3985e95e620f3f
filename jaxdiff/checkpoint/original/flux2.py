"""The names of FLUX.2's transformer in Black Forest Labs' code. Imports no JAX."""

from jaxdiff.checkpoint.original.flux import GUIDANCE, attention, norms
from jaxdiff.checkpoint.original.naming import WEIGHT, Names, Shapes, module, swapped

CLASS = "Flux2Transformer2DModel"
HEAD_WIDTH = 128
AXES, THETA = [32, 32, 32, 32], 2000  # of a head's rotary embedding
EPSILON = 1e-6


def config(shapes: Shapes) -> dict:
    """Returns the config that a file's shapes tell; raises InputError if they do not fit."""
    width = shapes.size("img_in.weight", 0)
    return {
        "_class_name": CLASS,
        "attention_head_dim": HEAD_WIDTH,
        "axes_dims_rope": AXES,
        "eps": EPSILON,
        "guidance_embeds": GUIDANCE in shapes,
        "in_channels": shapes.size("img_in.weight", 1),
        "joint_attention_dim": shapes.size("txt_in.weight", 1),
        "mlp_ratio": shapes.size("double_blocks.0.img_mlp.2.weight", 1) / max(width, 1),
        "num_attention_heads": width // HEAD_WIDTH,
        "num_layers": shapes.count("double_blocks"),
        "num_single_layers": shapes.count("single_blocks"),
        "patch_size": 1,
        "rope_theta": THETA,
        "timestep_guidance_channels": shapes.size("time_in.in_layer.weight", 1),
    }


def names(config: dict) -> Names:
    """Yields the transformer's names; no layer has a bias."""
    embedders = {"timestep": "time_in"}
    if config.get("guidance_embeds", True):
        embedders["guidance"] = "guidance_in"
    for ours, theirs in embedders.items():
        embedder = f"time_guidance_embed.{ours}_embedder"
        yield from module(f"{embedder}.linear_1", f"{theirs}.in_layer", WEIGHT)
        yield from module(f"{embedder}.linear_2", f"{theirs}.out_layer", WEIGHT)
    for modulation in ("double_stream_modulation_img", "double_stream_modulation_txt"):
        yield from module(f"{modulation}.linear", f"{modulation}.lin", WEIGHT)
    yield from module("single_stream_modulation.linear", "single_stream_modulation.lin", WEIGHT)
    yield from module("x_embedder", "img_in", WEIGHT)
    yield from module("context_embedder", "txt_in", WEIGHT)
    for i in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from attention(f"{ours}.attn", theirs, WEIGHT)
        for feed_forward, of in (("ff", "img"), ("ff_context", "txt")):
            yield from module(f"{ours}.{feed_forward}.linear_in", f"{theirs}.{of}_mlp.0", WEIGHT)
            yield from module(f"{ours}.{feed_forward}.linear_out", f"{theirs}.{of}_mlp.2", WEIGHT)
    for i in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        yield from module(f"{ours}.to_qkv_mlp_proj", f"{theirs}.linear1", WEIGHT)
        yield from module(f"{ours}.to_out", f"{theirs}.linear2", WEIGHT)
        yield from norms(ours, f"{theirs}.norm")
    yield from swapped("norm_out.linear", "final_layer.adaLN_modulation.1", WEIGHT)
    yield from module("proj_out", "final_layer.linear", WEIGHT)
