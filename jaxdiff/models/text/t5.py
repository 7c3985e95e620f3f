"""The encoders of T5 1.1 (Raffel et al., 2020, arXiv:1910.10683) and UMT5 (arXiv:2304.09151).

Their feed-forward networks are gated (Shazeer, 2020, arXiv:2002.05202).
"""

from dataclasses import dataclass
from typing import Self

import jax
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.attention import merge_heads, split_heads
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.feed_forward import gelu_tanh
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS

MODEL_TYPES = ("t5", "umt5")
FEED_FORWARD = "gated-gelu"
# What transformers derives from `feed_forward_proj`.
FIXED = {"dense_act_fn": "gelu_new", "is_gated_act": True}
# Keys that transformers also writes, but that do not change the encoder's hidden states.
IGNORED = {
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "dtype",
    "eos_token_id",
    "initializer_factor",
    "is_encoder_decoder",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "pad_token_id",
    "scalable_attention",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

SHARDING = (
    (r"\.([qkv]|wi_[01])\.kernel$", COLUMNS),
    (r"\.(o|wo)\.kernel$", ROWS),
    (r"^shared\.embedding$|\.relative_attention_bias\.embedding$", COLUMNS),
)


@dataclass(frozen=True)
class T5Config(ComponentConfig):
    """The fields of T5's and UMT5's `config.json` that shape the encoder."""

    component = "text_encoder"
    fixed = FIXED
    ignored = IGNORED

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = FEED_FORWARD

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type = {self.model_type!r} is not supported")
        if self.feed_forward_proj != FEED_FORWARD:
            raise ValueError(
                f"feed_forward_proj = {self.feed_forward_proj!r} is not supported (only "
                f"{FEED_FORWARD!r} is)"
            )
        buckets = self.relative_attention_num_buckets
        if buckets % 4 or buckets // 4 >= self.relative_attention_max_distance:
            raise ValueError(
                f"relative_attention_num_buckets = {buckets} is not supported (only multiples of 4 "
                "that are less than 4 times relative_attention_max_distance are)"
            )

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads a parsed `config.json`; raises InputError for what is not supported."""
        # Files from before T5 1.1, whose network is not gated, do not have the key.
        return super().from_json({"feed_forward_proj": "relu"} | data)


def relative_buckets(tokens: int, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket, int [tokens, tokens], of each query's (row's) distance to each key.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets is
    for one distance each; the others become wider with the logarithm, and the last is open.
    """
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    half, exact = buckets // 2, buckets // 4
    length = np.abs(distance)
    # In float32, as transformers: at the edges between buckets, rounding decides.
    ratio = np.log(np.maximum(length, exact).astype(np.float32) / np.float32(exact))
    wider = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + wider.astype(int), half - 1)
    return np.where(length < exact, length, far) + half * (distance > 0)


class _SelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (Linear(width, inner, use_bias=False, rngs=rngs) for _ in range(3))
        self.o = Linear(inner, width, use_bias=False, rngs=rngs)
        self.relative_attention_bias = (
            nnx.Embed(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
            if has_bias
            else None
        )

    def bias(self, buckets: np.ndarray) -> Array:
        """Returns what is added to the scores, [1, heads, tokens, tokens]."""
        return self.relative_attention_bias.embedding[...][buckets].transpose(2, 0, 1)[None]

    def __call__(self, x: Array, bias: Array, mask: Array | None) -> Array:
        query, key, value = (
            split_heads(layer(x), self.num_heads) for layer in (self.q, self.k, self.v)
        )
        # The kernels of `attend` add nothing to the scores. T5 does not scale them by the width.
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            None if mask is None else mask[:, None, None, :],
            scale=1.0,
        )
        return self.o(merge_heads(mixed))


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)


class _SelfAttentionLayer(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs):
        self.layer_norm = _norm(config, rngs)
        self.SelfAttention = _SelfAttention(config, has_bias=has_bias, rngs=rngs)

    def __call__(self, x: Array, bias: Array, mask: Array | None) -> Array:
        return x + self.SelfAttention(self.layer_norm(x), bias, mask)


class _FeedForward(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))


class _FeedForwardLayer(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.layer_norm = _norm(config, rngs)
        self.DenseReluDense = _FeedForward(config, rngs=rngs)  # the files' name

    def __call__(self, x: Array) -> Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nnx.Module):
    def __init__(self, config: T5Config, *, has_bias: bool, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [
                _SelfAttentionLayer(config, has_bias=has_bias, rngs=rngs),
                _FeedForwardLayer(config, rngs=rngs),
            ]
        )

    def __call__(self, x: Array, bias: Array, mask: Array | None) -> Array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias, mask))


class _Encoder(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        # T5's blocks share the first one's biases.
        self.block = nnx.List(
            [
                _Block(config, has_bias=config.model_type == "umt5" or i == 0, rngs=rngs)
                for i in range(config.num_layers)
            ]
        )
        self.final_layer_norm = _norm(config, rngs)

    def __call__(self, x: Array, buckets: np.ndarray, mask: Array | None) -> Array:
        for block in self.block:
            attention = block.layer[0].SelfAttention
            if attention.relative_attention_bias is not None:
                bias = attention.bias(buckets)
            x = block(x, bias, mask)
        return self.final_layer_norm(x)


class T5EncoderModel(nnx.Module):
    """A transformer over the prompt's tokens whose attention depends on their distances."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.shared = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = _Encoder(config, rngs=rngs)

    def __call__(self, token_ids: Array, mask: Array | None = None) -> Array:
        """Encodes prompts.

        Args:
          token_ids: int32 [batch, tokens].
          mask: bool [batch, tokens]: which tokens are seen, at least one in each row; None for all,
            also those of the padding.

        Returns:
          the hidden states after the final norm, [batch, tokens, d_model], in the dtype of the
          weights.
        """
        embedded = self.shared.embedding[...][token_ids]  # nnx.Embed would return another dtype
        buckets = relative_buckets(token_ids.shape[1], self.num_buckets, self.max_distance)
        return self.encoder(embedded, buckets, mask)
