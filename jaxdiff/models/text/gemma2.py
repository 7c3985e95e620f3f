"""Gemma 2 (arXiv:2408.00118)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.feed_forward import gelu_tanh
from jaxdiff.models.text import decoder

SHARDING = decoder.SHARDING
FIXED = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
# The first is for logits; `hidden_activation` has replaced the second.
IGNORED = decoder.IGNORED | {"final_logit_softcapping", "hidden_act"}


@dataclass(frozen=True)
class Gemma2Config(decoder.DecoderConfig):
    """The fields of Gemma 2's `config.json` that shape the network."""

    fixed = FIXED
    ignored = IGNORED
    # No prompt is longer than the window, so it does not matter which layers slide.
    layer_types = ("full_attention", "sliding_attention")

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float = 50.0
    sliding_window: int = 4096


class _RMSNorm(nnx.Module):
    """An RMS normalisation that scales by one plus its weights."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.weight = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,)))

    def __call__(self, x: Array) -> Array:
        scale = 1 + self.weight[...].astype(jnp.float32)  # bfloat16 would lose a small weight
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class _SelfAttention(decoder.SelfAttention):
    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping

    def mixed(self, query: Array, key: Array, value: Array, mask: Array) -> Array:
        # The kernels of `attend` cannot cap the scores.
        batch, tokens, heads, width = query.shape
        query = query.reshape(batch, tokens, key.shape[2], -1, width)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key, preferred_element_type=jnp.float32)
        capped = self.cap * jnp.tanh(scores * self.scale / self.cap)
        seen = jnp.tri(tokens, dtype=bool) & mask[:, None, None, None, :]
        weights = jax.nn.softmax(capped, axis=-1, where=seen).astype(value.dtype)
        return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(batch, tokens, heads, width)


class _Layer(nnx.Module):
    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        def norm() -> _RMSNorm:
            return _RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)

        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.self_attn = _SelfAttention(config, rngs=rngs)
        self.mlp = decoder.MLP(config, activation=gelu_tanh, rngs=rngs)

    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        mixed = self.self_attn(self.input_layernorm(x), mask, angles)
        x = x + self.post_attention_layernorm(mixed)
        hidden = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(hidden)


class Gemma2Model(decoder.Decoder):
    """Gemma 2: norms around each branch and capped attention scores (arXiv:2408.00118)."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs, layer=_Layer, norm=_RMSNorm)
        self.sliding_window = config.sliding_window

    def embedded(self, token_ids: Array) -> Array:
        """Returns the tokens' vectors [batch, tokens, hidden size] in the dtype of the weights."""
        vectors = super().embedded(token_ids)
        # Rounded to the weights' dtype, as in training: 48 for bfloat16 at a width of 2304.
        return vectors * jnp.asarray(vectors.shape[-1] ** 0.5, vectors.dtype)

    def __call__(self, token_ids: Array, mask: Array, *, layers: tuple[int, ...]) -> list[Array]:
        """Encodes prompts as `Decoder` does; raises ValueError for more tokens than its window."""
        if token_ids.shape[1] > self.sliding_window:
            raise ValueError(
                f"{token_ids.shape[1]} tokens are more than the window of {self.sliding_window}"
            )
        return super().__call__(token_ids, mask, layers=layers)
