"""Qwen3 (arXiv:2505.09388) and the text part of Qwen2.5-VL (arXiv:2502.13923)."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Self

from flax import nnx
from jax import Array

from jaxdiff.errors import InputError
from jaxdiff.models.text import decoder

SHARDING = decoder.SHARDING
QWEN3 = {"model_type": "qwen3", "hidden_act": "silu"}
QWEN2_5_VL = {"model_type": "qwen2_5_vl", "hidden_act": "silu"}
# The window has no effect, since `use_sliding_window` must be off.
IGNORED = decoder.IGNORED | {"max_window_layers", "sliding_window"}
# Keys for images and videos, which prompts do not have.
VISION = {
    "image_token_id",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
}


@dataclass(frozen=True)
class Qwen3Config(decoder.DecoderConfig):
    """The fields of Qwen3's `config.json` that shape the network."""

    fixed = QWEN3
    ignored = IGNORED

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    head_dim: int = 128


@dataclass(frozen=True)
class Qwen2_5_VLConfig(decoder.DecoderConfig):
    """The fields of Qwen2.5-VL's `config.json` that shape the text network."""

    fixed = QWEN2_5_VL
    ignored = IGNORED | VISION
    # A token of text has the same position along all axes of M-RoPE, which is then plain.
    rope_types = ("default", "mrope")

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} cannot be split into heads")
        super().__post_init__()
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section = {list(self.mrope_section)} is not half of the head's width "
                f"{self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads a parsed `config.json`; raises InputError for what is not supported.

        The text's fields are in `text_config` or, in older files, beside the others.
        """
        data = dict(data)
        text = data.pop("text_config", None)
        if text is not None:
            if not isinstance(text, dict) or text.get("model_type") != "qwen2_5_vl_text":
                raise InputError(
                    "text_encoder/config.json: text_config is not one of model_type = "
                    "'qwen2_5_vl_text'"
                )
            # Some files have both; transformers takes these ones.
            flat = {field.name for field in fields(cls)} | {"rope_parameters", "rope_scaling"}
            data = {key: value for key, value in data.items() if key not in flat}
            data |= {key: value for key, value in text.items() if key != "model_type"}
        return super().from_json(data)

    def to_json(self) -> dict:
        """Returns the `config.json` that transformers reads."""
        data = super().to_json()
        rotation = {key: data.pop(key) for key in ("rope_theta", "mrope_section")}
        return data | {"rope_parameters": {"rope_type": "default", **rotation}}


class _Layer(nnx.Module):
    def __init__(self, config: decoder.DecoderConfig, *, rngs: nnx.Rngs, **attention: bool):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.self_attn = decoder.SelfAttention(config, rngs=rngs, **attention)
        self.post_attention_layernorm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = decoder.MLP(config, rngs=rngs)

    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), mask, angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(decoder.Decoder):
    """Qwen3, which normalises each head's queries and keys (arXiv:2505.09388)."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs, layer=partial(_Layer, qk_norm=True))


class Qwen2_5_VLTextModel(decoder.Decoder):
    """Qwen2.5-VL without images: queries, keys and values have biases (arXiv:2502.13923)."""

    def __init__(self, config: Qwen2_5_VLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs, layer=partial(_Layer, qkv_bias=True))
