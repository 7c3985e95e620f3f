"""The names of the text encoders in whole files of transformer models. Imports no JAX.

The names are transformers' own; only the configs have to be found, from the shapes.
"""

from jaxdiff.checkpoint.original.ldm import clip_names
from jaxdiff.checkpoint.original.naming import WEIGHT, Names, Shapes, module
from jaxdiff.checkpoint.single_file_configs import CLIP_L, OPENCLIP_BIGG
from jaxdiff.checkpoint.tensors import Identity, StoredTensor

CLIP_HEAD_WIDTH = 64
T5_BLOCK = (
    *(f"layer.0.SelfAttention.{part}" for part in ("q", "k", "v", "o")),
    *(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
    *("layer.0.layer_norm", "layer.1.layer_norm"),
)


def clip_l_config(shapes: Shapes) -> dict:
    """Returns the config of CLIP-L's text encoder."""
    return CLIP_L | _clip_sizes(shapes)


def projected_clip_l_config(shapes: Shapes) -> dict:
    """Returns the config of CLIP-L's text encoder with a projection."""
    return clip_l_config(shapes) | {"architectures": ["CLIPTextModelWithProjection"]}


def clip_g_config(shapes: Shapes) -> dict:
    """Returns the config of OpenCLIP bigG's text encoder."""
    width = shapes.size("text_projection.weight", 0)
    return OPENCLIP_BIGG | _clip_sizes(shapes) | {"projection_dim": width}


def _clip_sizes(shapes: Shapes) -> dict:
    vocabulary, width = (
        shapes.size("text_model.embeddings.token_embedding.weight", axis) for axis in (0, 1)
    )
    return {
        "hidden_size": width,
        "intermediate_size": shapes.size("text_model.encoder.layers.0.mlp.fc1.bias", 0),
        "max_position_embeddings": shapes.size(
            "text_model.embeddings.position_embedding.weight", 0
        ),
        "num_attention_heads": width // CLIP_HEAD_WIDTH,
        "num_hidden_layers": shapes.count("text_model.encoder.layers"),
        "projection_dim": width,
        "vocab_size": vocabulary,
    }


def projected_clip_l_names(config: dict) -> Names:
    """Yields the names of CLIP-L's text encoder, whose projection changes nothing.

    Stable Diffusion 3 takes CLIP-L's pooled text as it is. In directories, it therefore has the
    identity as its projection; in single files, the projection is missing or not to be used.
    """
    yield from clip_names(config)
    yield "text_projection.weight", "text_model.final_layer_norm.bias", _identity


def _identity(bias: StoredTensor) -> StoredTensor:
    return Identity(bias.file, "text_projection.weight", "F32", bias.shape * 2, bias.offset)


def clip_g_names(config: dict) -> Names:
    """Yields the names of OpenCLIP bigG's text encoder."""
    yield from clip_names(config)
    yield from module("text_projection", "text_projection", WEIGHT)


def t5_config(shapes: Shapes) -> dict:
    """Returns the config of T5's encoder."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    heads = shapes.size(bias, 1)
    width = shapes.size("encoder.block.0.layer.0.SelfAttention.q.weight", 0)
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": shapes.size("encoder.block.0.layer.1.DenseReluDense.wo.weight", 1),
        "d_kv": width // max(heads, 1),
        "d_model": shapes.size("shared.weight", 1),
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_heads": heads,
        "num_layers": shapes.count("encoder.block"),
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": shapes.size(bias, 0),
        "vocab_size": shapes.size("shared.weight", 0),
    }


def t5_names(config: dict) -> Names:
    """Yields the names of T5's encoder."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    for layer in ("shared", "encoder.final_layer_norm", bias):
        yield from module(layer, layer, WEIGHT)
    for i in range(config["num_layers"]):
        for part in T5_BLOCK:
            layer = f"encoder.block.{i}.{part}"
            yield from module(layer, layer, WEIGHT)
