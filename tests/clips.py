"""Tiny CLIPs in the directories that transformers and OpenCLIP write, random weights in them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import networks
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxdiff.models.text.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from jaxdiff.weights.load import file_shapes, load_params, places
from jaxdiff.weights.network import abstract_network

TOKENIZER = Path(__file__).parents[1] / "jaxdiff" / "assets" / "shapes64" / "tokenizer"
WORDS = {"vocab_size": 641, "max_position_embeddings": 24, "eos_token_id": 2}
OPENAI = CLIPConfig(
    CLIPTextConfig(
        **WORDS,
        hidden_size=32,
        intermediate_size=128,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    ),
    24,
)
# Heads of another width, and a wider MLP: as in the larger models of OpenCLIP.
OPEN_CLIP = CLIPConfig(
    dataclasses.replace(OPENAI.text, hidden_act="gelu", num_hidden_layers=3),
    dataclasses.replace(
        OPENAI.vision,
        hidden_act="gelu",
        hidden_size=40,
        intermediate_size=196,
        num_attention_heads=2,
        patch_size=7,  # which does not divide the image
    ),
    24,
)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def weights(config: CLIPConfig) -> dict[str, np.ndarray]:
    """By transformers' keys."""
    _, shapes = abstract_network(CLIPModel, config)
    drawn = {key: networks.weight(key, shape) for key, shape in file_shapes(shapes).items()}
    return drawn | {"logit_scale": np.array(np.log(30), np.float32)}


def network(config: CLIPConfig) -> Callable[[np.ndarray], jax.Array]:
    """What makes vectors of normalised images, [batch, h, w, 3]."""
    graph, shapes = abstract_network(CLIPModel, config)
    tensors = {
        key: SimpleNamespace(shape=value.shape, read=partial(np.asarray, value))
        for key, value in weights(config).items()
    }
    params = load_params(places(shapes, np.float32), tensors)
    return lambda images: jax.jit(lambda p, x: nnx.merge(graph, p).image_features(x))(
        params, images
    )


def write_transformers(directory: Path, config: CLIPConfig) -> Path:
    """Writes what `CLIPModel` and `CLIPProcessor` of transformers would."""
    shutil.copytree(TOKENIZER, directory)
    said = {
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "text_config": dataclasses.asdict(config.text) | {"architectures": None, "top_k": 50},
        "vision_config": dataclasses.asdict(config.vision),
    }
    size = config.vision.image_size
    pixels = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": MEAN,
        "image_std": STD,
        "image_processor_type": "CLIPImageProcessor",
    }
    (directory / "config.json").write_text(json.dumps(said))
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    buffers = {  # as in OpenAI's files
        f"{part}_model.embeddings.position_ids": np.arange(3) for part in ("text", "vision")
    }
    save_file(weights(config) | buffers, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_open_clip(directory: Path, config: CLIPConfig) -> Path:
    """Writes the same weights as OpenCLIP would."""
    shutil.copytree(TOKENIZER, directory)
    text, vision = config.text, config.vision
    said = {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": text.hidden_act == "quick_gelu",
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
            },
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "layers": vision.num_hidden_layers,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(said))
    save_file(open_clip_weights(config), directory / "open_clip_model.safetensors")
    return directory


def open_clip_weights(config: CLIPConfig) -> dict[str, np.ndarray]:
    """By OpenCLIP's keys."""
    ours, theirs = weights(config), {}
    for tower, prefix in (("text_model.", ""), ("vision_model.", "visual.")):
        layers = (config.text if prefix == "" else config.vision).num_hidden_layers
        for i in range(layers):
            layer, block = f"{tower}encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                theirs[f"{block}.attn.in_proj_{kind}"] = np.concatenate(
                    [ours[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                )
                for our, their in {
                    "self_attn.out_proj": "attn.out_proj",
                    "layer_norm1": "ln_1",
                    "layer_norm2": "ln_2",
                    "mlp.fc1": "mlp.c_fc",
                    "mlp.fc2": "mlp.c_proj",
                }.items():
                    theirs[f"{block}.{their}.{kind}"] = ours[f"{layer}.{our}.{kind}"]
    for kind in ("weight", "bias"):
        theirs[f"ln_final.{kind}"] = ours[f"text_model.final_layer_norm.{kind}"]
        theirs[f"visual.ln_pre.{kind}"] = ours[f"vision_model.pre_layrnorm.{kind}"]
        theirs[f"visual.ln_post.{kind}"] = ours[f"vision_model.post_layernorm.{kind}"]
    return theirs | {
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": ours["text_model.embeddings.position_embedding.weight"],
        "text_projection": np.ascontiguousarray(ours["text_projection.weight"].T),
        "visual.conv1.weight": ours["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": ours["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": ours["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": np.ascontiguousarray(ours["visual_projection.weight"].T),
        "logit_scale": ours["logit_scale"],
    }


def images() -> list[np.ndarray]:
    """Some uint8 [h, w, 3]: square and not, larger and smaller than what the networks see."""
    random = np.random.default_rng(0)
    sizes = (64, 64), (40, 71), (90, 33), (32, 32), (20, 17)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


TEXTS = ["a red circle", "a star above a circle", "one " * 60, ""]
