"""A small FLUX.1 dev: its transformer in the original naming, and the rest as a directory."""

import json
from pathlib import Path

import jax
import numpy as np
import original_transformers as names

from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.families.flux import FLUX, PIPELINE
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.flux import FluxConfig, FluxTransformer2DModel
from jaxdiff.models.text.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.text.t5 import T5Config, T5EncoderModel
from jaxdiff.weights.load import file_shapes
from jaxdiff.weights.network import abstract_network
from jaxdiff.weights.save import save_pipeline

T5 = {
    "added_tokens": [],
    "model": {
        "type": "Unigram",
        "unk_id": 2,
        "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -2.0], ["a", -2.0]],
    },
}
CLIP_TOKENIZER = BUNDLED["shapes64"] / "tokenizer"
CLIP_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CLIP_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 24}
VAE_SIZES = {"block_out_channels": (8, 16), "norm_num_groups": 8, "latent_channels": 16}
VAE_SIZES |= {"down_block_types": ("DownEncoderBlock2D",) * 2}
VAE_SIZES |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
NETWORKS = {
    "text_encoder": (CLIPTextModel, CLIPTextConfig(vocab_size=641, **CLIP_SIZES)),
    "text_encoder_2": (
        T5EncoderModel,
        T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    ),
    "vae": (
        AutoencoderKL,
        AutoencoderKLConfig(use_quant_conv=False, use_post_quant_conv=False, **VAE_SIZES),
    ),
}
CONFIG = FluxConfig(
    num_layers=2,
    num_single_layers=1,
    num_attention_heads=1,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    guidance_embeds=True,
)
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
LAYER = "double_blocks.0.img_attn.qkv"


def drawn(network, config) -> dict:
    random = np.random.default_rng(0)
    shapes = abstract_network(network, config)[1]
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)


def save_base(folder: Path) -> Path:
    """Writes a directory of FLUX.1 dev without its transformer, and returns it."""
    (folder / "t5").mkdir()
    (folder / "t5" / "tokenizer.json").write_text(json.dumps(T5))
    save_pipeline(
        folder / "base",
        components=FLUX.components,
        pipeline={
            "_class_name": PIPELINE,
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            **FLUX.absent,
        },
        configs={name: config for name, (_, config) in NETWORKS.items()},
        params={name: drawn(network, config) for name, (network, config) in NETWORKS.items()},
        scheduler=SCHEDULER,
        tokenizers={
            "text_encoder": BUNDLED["shapes64"] / "tokenizer",
            "text_encoder_2": folder / "t5",
        },
        dtype=np.float32,
    )
    return folder / "base"


def transformer() -> dict[str, np.ndarray]:
    """Returns a transformer's weights by their keys in diffusers."""
    random = np.random.default_rng(0)
    shapes = file_shapes(abstract_network(FluxTransformer2DModel, CONFIG)[1])
    return {key: random.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def original(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the same weights by their original keys."""
    return names.original(names.FLUX, state, np.concatenate)
