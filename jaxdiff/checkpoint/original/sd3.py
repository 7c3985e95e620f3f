"""The names of Stable Diffusion 3's transformer in Stability AI's code. Imports no JAX."""

import math

from jaxdiff.checkpoint.original.naming import WEIGHT, Names, Shapes, fused, module, swapped

CLASS = "SD3Transformer2DModel"
HEAD_WIDTH = 64
SAMPLE_SIZE = 128  # latents along each side of an image, in all published models


def config(shapes: Shapes) -> dict:
    """Returns the config that a file's shapes tell; raises InputError if they do not fit."""
    patch, width = shapes.size("x_embedder.proj.weight", 2), shapes.size("context_embedder.bias", 0)
    layers = shapes.count("joint_blocks")
    dual = [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    return {
        "_class_name": CLASS,
        "attention_head_dim": HEAD_WIDTH,
        "caption_projection_dim": width,
        "dual_attention_layers": dual,
        "in_channels": shapes.size("x_embedder.proj.weight", 1),
        "joint_attention_dim": shapes.size("context_embedder.weight", 1),
        "num_attention_heads": width // HEAD_WIDTH,
        "num_layers": layers,
        "out_channels": shapes.size("final_layer.linear.bias", 0) // max(patch, 1) ** 2,
        "patch_size": patch,
        "pooled_projection_dim": shapes.size("y_embedder.mlp.0.weight", 1),
        "pos_embed_max_size": math.isqrt(shapes.size("pos_embed", 1)),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        "sample_size": SAMPLE_SIZE,
    }


def names(config: dict) -> Names:
    """Yields the transformer's names."""
    yield "pos_embed.pos_embed", "pos_embed", None
    yield from module("pos_embed.proj", "x_embedder.proj")
    for ours, theirs in (("timestep", "t_embedder"), ("text", "y_embedder")):
        yield from module(f"time_text_embed.{ours}_embedder.linear_1", f"{theirs}.mlp.0")
        yield from module(f"time_text_embed.{ours}_embedder.linear_2", f"{theirs}.mlp.2")
    yield from module("context_embedder", "context_embedder")
    for i in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        last = i == config["num_layers"] - 1
        yield from _image_half(config, ours, f"{theirs}.x_block", i)
        yield from _text_half(config, ours, f"{theirs}.context_block", last)
    yield from swapped("norm_out.linear", "final_layer.adaLN_modulation.1")
    yield from module("proj_out", "final_layer.linear")


def _image_half(config: dict, ours: str, theirs: str, block: int) -> Names:
    yield from module(f"{ours}.norm1.linear", f"{theirs}.adaLN_modulation.1")
    yield from module(f"{ours}.ff.net.0.proj", f"{theirs}.mlp.fc1")
    yield from module(f"{ours}.ff.net.2", f"{theirs}.mlp.fc2")
    dual = block in config.get("dual_attention_layers", ())
    for attention in ("attn", "attn2") if dual else ("attn",):
        of_ours, of_theirs = f"{ours}.{attention}", f"{theirs}.{attention}"
        yield from fused(f"{of_ours}.to_*", f"{of_theirs}.qkv")
        yield from module(f"{of_ours}.to_out.0", f"{of_theirs}.proj")
        if config.get("qk_norm"):
            yield from module(f"{of_ours}.norm_q", f"{of_theirs}.ln_q", WEIGHT)
            yield from module(f"{of_ours}.norm_k", f"{of_theirs}.ln_k", WEIGHT)


def _text_half(config: dict, ours: str, theirs: str, last: bool) -> Names:
    """Yields the names of what is for the text; the last block needs its keys and values alone."""
    norm = swapped if last else module
    yield from norm(f"{ours}.norm1_context.linear", f"{theirs}.adaLN_modulation.1")
    yield from fused(f"{ours}.attn.add_*_proj", f"{theirs}.attn.qkv")
    if config.get("qk_norm"):
        yield from module(f"{ours}.attn.norm_added_q", f"{theirs}.attn.ln_q", WEIGHT)
        yield from module(f"{ours}.attn.norm_added_k", f"{theirs}.attn.ln_k", WEIGHT)
    if not last:
        yield from module(f"{ours}.attn.to_add_out", f"{theirs}.attn.proj")
        yield from module(f"{ours}.ff_context.net.0.proj", f"{theirs}.mlp.fc1")
        yield from module(f"{ours}.ff_context.net.2", f"{theirs}.mlp.fc2")
