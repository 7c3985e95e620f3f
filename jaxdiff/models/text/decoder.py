"""What the causal language models that encode prompts share.

Each layer is attention and a gated feed-forward network (Shazeer, 2020, arXiv:2002.05202), both
after an RMS normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467). Positions enter by rotating
queries and keys (Su et al., 2021, arXiv:2104.09864).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Self

import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checks import shown
from jaxdiff.errors import InputError
from jaxdiff.models.attention import attend, merge_heads, split_heads
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.embeddings import constant_angles, rotary_angles, rotate_halves
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS

# Keys that transformers also writes, but that do not change the hidden states: the rotation has no
# limit at `max_position_embeddings`.
IGNORED = {
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "bos_token_id",
    "cache_implementation",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

SHARDING = (
    (r"\.([qkv]_proj|gate_proj|up_proj)\.kernel$", COLUMNS),
    (r"\.(o_proj|down_proj)\.kernel$", ROWS),
    (r"^embed_tokens\.embedding$", COLUMNS),
)


@dataclass(frozen=True)
class DecoderConfig(ComponentConfig):
    """The fields that all decoders have; each also has a `head_dim`.

    Attributes:
      rope_types: the names under which files have the plain rotation.
      layer_types: the kinds of layers that may occur.
    """

    component = "text_encoder"
    rope_types: ClassVar = ("default",)
    layer_types: ClassVar = ("full_attention",)

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"num_key_value_heads = {groups} does not divide num_attention_heads = {heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} cannot be split into halves")

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads a parsed `config.json` of transformers 4 or 5.

        `rope_theta` may stand beside the other keys, in `rope_parameters` or in `rope_scaling`.

        Raises:
          InputError: for a key or value that is not supported.
        """
        file, kept = f"{cls.component}/config.json", dict(data)
        scaling, parameters = kept.pop("rope_scaling", None), kept.pop("rope_parameters", None)
        rotation = scaling or parameters or {}  # in the order of transformers
        if not isinstance(rotation, dict):
            raise InputError(f"{file}: rope_parameters = {shown(rotation)} is not supported")
        rotation = dict(rotation)
        for key in ("rope_type", "type"):  # the latter in older files, or in both
            if (kind := rotation.pop(key, "default")) not in cls.rope_types:
                raise InputError(
                    f"{file}: {key} = {shown(kind)} is not supported (only 'default' is)"
                )
        kinds = kept.pop("layer_types", None) or []
        if not isinstance(kinds, list) or any(kind not in cls.layer_types for kind in kinds):
            raise InputError(f"{file}: layer_types = {shown(kinds)} is not supported")
        return super().from_json(kept | rotation)


class SelfAttention(nnx.Module):
    """Causal attention of rotated heads; groups of queries share a key and a value.

    See Ainslie et al., 2023, arXiv:2305.13245.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, qkv_bias: bool = False, qk_norm=False
    ):
        width, head_width = config.hidden_size, config.head_dim
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(width, heads * head_width, use_bias=qkv_bias, rngs=rngs)
            for heads in (self.num_heads, self.num_groups, self.num_groups)
        )
        self.o_proj = Linear(self.num_heads * head_width, width, use_bias=False, rngs=rngs)
        self.q_norm, self.k_norm = (
            nnx.RMSNorm(head_width, epsilon=config.rms_norm_eps, rngs=rngs) if qk_norm else None
            for _ in range(2)
        )

    def __call__(self, x: Array, mask: Array, angles: Array) -> Array:
        """Maps [batch, tokens, width] to the same shape; tokens outside the mask are not seen."""
        query = split_heads(self.q_proj(x), self.num_heads)
        key = split_heads(self.k_proj(x), self.num_groups)
        value = split_heads(self.v_proj(x), self.num_groups)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate_halves(query, angles), rotate_halves(key, angles)
        return self.o_proj(merge_heads(self.mixed(query, key, value, mask)))

    def mixed(self, query: Array, key: Array, value: Array, mask: Array) -> Array:
        """Mixes the values, [batch, tokens, heads, head width], by how queries fit keys."""
        return attend(query, key, value, mask=mask, is_causal=True)


class MLP(nnx.Module):
    """A linear layer gated by the activation of another, and a linear layer."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        activation: Callable[[Array], Array] = nnx.silu,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        width, hidden = config.hidden_size, config.intermediate_size
        self.activation = activation
        self.gate_proj = Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, tokens, width] to the same shape."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Decoder(nnx.Module):
    """A causal transformer over the prompt's tokens that returns hidden states of its layers."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        layer: Callable[..., nnx.Module],
        norm: Callable[..., nnx.Module] = nnx.RMSNorm,
    ):
        """Makes the network of `layer(config, rngs=...)`, called with x, mask and angles."""
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = norm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)

    def embedded(self, token_ids: Array) -> Array:
        """Returns the tokens' vectors [batch, tokens, hidden size] in the dtype of the weights."""
        return self.embed_tokens.embedding[...][token_ids]  # nnx.Embed would return another dtype

    def __call__(self, token_ids: Array, mask: Array, *, layers: tuple[int, ...]) -> list[Array]:
        """Encodes prompts that are padded on the right; computes only the layers it needs.

        Args:
          token_ids: int32 [batch, tokens].
          mask: bool [batch, tokens]: which tokens are the prompt's. Others are not seen, but have
            hidden states too. The first is always the prompt's.
          layers: which hidden states, numbered as in transformers: 0 is the embeddings, i the input
            of layer i, and the number of layers the last output, after the final norm. Negative
            ones count from the end.

        Returns:
          the hidden states, each [batch, tokens, hidden size] in the dtype of the weights.

        Raises:
          ValueError: if there is no such layer.
        """
        positions = np.arange(token_ids.shape[1])[:, None]
        # In float32 at every step, as transformers: the angles of late positions depend on it.
        angles = constant_angles(
            rotary_angles(positions, [self.head_dim], self.rope_theta, dtype=np.float32)
        )
        return self.states(self.embedded(token_ids), mask, angles, layers=layers)

    def states(
        self, x: Array, mask: Array, angles: Array, *, layers: tuple[int, ...]
    ) -> list[Array]:
        """Returns hidden states from the tokens' vectors.

        Args:
          x: [batch, tokens, hidden size].
          mask, layers: as in `__call__`.
          angles: of the tokens' positions, as in `embeddings.rotate_halves`.

        Raises:
          ValueError: if there is no such layer.
        """
        count = len(self.layers) + 1
        for index in layers:
            if not -count <= index < count:
                raise ValueError(f"layer {index} is not one of the {count} hidden states")
        indices = [index % count for index in layers]
        states = [x]
        for layer in islice(self.layers, max(indices)):
            states.append(layer(states[-1], mask, angles))
        if len(states) == count:
            states[-1] = self.norm(states[-1])
        return [states[index] for index in indices]
