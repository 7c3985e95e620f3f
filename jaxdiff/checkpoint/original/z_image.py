"""The names of Z-Image's transformer in its authors' code, as ComfyUI's files have them.

Imports no JAX.
"""

from jaxdiff.checkpoint.original.naming import WEIGHT, Names, Shapes, fused, module

CLASS = "ZImageTransformer2DModel"
AXES, LENGTHS = [32, 48, 48], [1536, 512, 512]  # of a head's rotary embedding
THETA = 256.0
PATCH = 2
EPSILON = 1e-5


def config(shapes: Shapes) -> dict:
    """Returns the config that a file's shapes tell; raises InputError if they do not fit."""
    width = shapes.size("x_embedder.weight", 0)
    return {
        "_class_name": CLASS,
        "all_f_patch_size": [1],
        "all_patch_size": [PATCH],
        "axes_dims": AXES,
        "axes_lens": LENGTHS,
        "cap_feat_dim": shapes.size("cap_embedder.1.weight", 1),
        "dim": width,
        "in_channels": shapes.size("x_embedder.weight", 1) // PATCH**2,
        "n_heads": width // sum(AXES),
        "n_layers": shapes.count("layers"),
        "n_refiner_layers": shapes.count("noise_refiner"),
        "norm_eps": EPSILON,
        "qk_norm": True,
        "rope_theta": THETA,
        "t_scale": 1000.0,
    }


def names(config: dict) -> Names:
    """Yields the transformer's names."""
    for part in ("x_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"):
        first, dot, rest = part.partition(".")
        yield from module(f"all_{first}.{PATCH}-1{dot}{rest}", part)
    for part in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"):
        yield from module(part, part)
    yield from module("cap_embedder.0", "cap_embedder.0", WEIGHT)
    for token in ("x_pad_token", "cap_pad_token"):
        yield token, token, None
    for i in range(config["n_layers"]):
        yield from _block(f"layers.{i}", modulated=True)
    for i in range(config["n_refiner_layers"]):
        yield from _block(f"noise_refiner.{i}", modulated=True)
        yield from _block(f"context_refiner.{i}", modulated=False)


def _block(name: str, modulated: bool) -> Names:
    attention = f"{name}.attention"
    yield from fused(f"{attention}.to_*", f"{attention}.qkv", WEIGHT)
    yield from module(f"{attention}.to_out.0", f"{attention}.out", WEIGHT)
    yield from module(f"{attention}.norm_q", f"{attention}.q_norm", WEIGHT)
    yield from module(f"{attention}.norm_k", f"{attention}.k_norm", WEIGHT)
    for part in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        yield from module(f"{name}.{part}", f"{name}.{part}", WEIGHT)
    for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield from module(f"{name}.{part}", f"{name}.{part}", WEIGHT)
    if modulated:
        yield from module(f"{name}.adaLN_modulation.0", f"{name}.adaLN_modulation.0")
