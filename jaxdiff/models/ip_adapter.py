"""IP-Adapters: images as prompts for the U-Nets of Stable Diffusion 1 and XL.

Ye et al., 2023, arXiv:2308.06721, section 3.2: a small network turns CLIP's view of an image into
tokens, and each attention to the text also attends to these, by keys and values of its own. The
U-Net is given the keys and values: they do not depend on the timestep.

Attribute names are the keys of the published files, `image_proj.*` and `ip_adapter.K.*`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.errors import InputError
from jaxdiff.models.attention import attention
from jaxdiff.models.layers import ImagePrompt
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS
from jaxdiff.models.text.clip import CLIPVisionModelWithProjection

PLAIN, PLUS, FULL_FACE = "plain", "plus", "full-face"
HEAD_WIDTH = 64  # in the resampler
LAYER = re.compile(r"image_proj\.layers\.\d+\.0\.to_q\.weight")
ATTENTION = re.compile(r"ip_adapter\.\d+\.to_k_ip\.weight")

SHARDING = (
    (r"\.(to_(q|kv|k_ip|v_ip)|layers\.\d+\.1\.1)\.kernel$", COLUMNS),
    (r"\.(to_out|layers\.\d+\.1\.3)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class ResamplerConfig:
    """The sizes of a Plus adapter's image projection.

    Attributes:
      width: of the tokens in it.
      depth: how many layers it has.
      attention_width: of the queries; the heads are 64 numbers wide.
      hidden: the width inside the feed-forward layers.
    """

    width: int
    depth: int
    attention_width: int
    hidden: int


@dataclass(frozen=True)
class IPAdapterConfig:
    """What shapes an adapter; it has no config file.

    Attributes:
      kind: PLAIN, PLUS or FULL_FACE.
      image_width: of what it reads: CLIP's vectors if it is plain, else its hidden states.
      context_width: of the image tokens, equal to the U-Net's `cross_attention_dim`.
      tokens: how many an image becomes; 0: as many as CLIP's (full-face).
      widths: of the U-Net's attentions to the text, in the order of `cross_attention_widths`.
      resampler: that of PLUS, else None.
    """

    kind: str
    image_width: int
    context_width: int
    tokens: int
    widths: tuple[int, ...]
    resampler: ResamplerConfig | None = None

    @classmethod
    def from_shapes(cls, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> "IPAdapterConfig":
        """Derives the config from the shapes of a file's weights.

        Only the weights that tell a size are looked at: the loader compares all of them.

        Args:
          kind: PLAIN, PLUS or FULL_FACE.
          shapes: by the file's keys.

        Raises:
          InputError: if one of these weights is missing or has an impossible shape.
        """
        sizes = partial(_sizes, shapes)
        count = sum(1 for key in shapes if ATTENTION.fullmatch(key))
        widths = tuple(sizes(f"ip_adapter.{2 * i + 1}.to_k_ip.weight", 2)[0] for i in range(count))
        if kind == PLAIN:
            out, image_width = sizes("image_proj.proj.weight", 2)
            (context_width,) = sizes("image_proj.norm.weight", 1)
            return cls(kind, image_width, context_width, out // context_width, widths)
        if kind == FULL_FACE:
            _, image_width = sizes("image_proj.proj.0.weight", 2)
            (context_width,) = sizes("image_proj.proj.3.weight", 1)
            return cls(kind, image_width, context_width, 0, widths)
        width, image_width = sizes("image_proj.proj_in.weight", 2)
        (context_width,) = sizes("image_proj.norm_out.weight", 1)
        attention_width, _ = sizes("image_proj.layers.0.0.to_q.weight", 2)
        if attention_width % HEAD_WIDTH:
            raise InputError(
                f"the IP-Adapter's image_proj.layers.0.0.to_q.weight makes {attention_width} "
                f"numbers, which cannot be split into heads of {HEAD_WIDTH}; copy the file again"
            )
        resampler = ResamplerConfig(
            width=width,
            depth=sum(1 for key in shapes if LAYER.fullmatch(key)),
            attention_width=attention_width,
            hidden=sizes("image_proj.layers.0.1.1.weight", 2)[0],
        )
        _, tokens, _ = sizes("image_proj.latents", 3)
        return cls(kind, image_width, context_width, tokens, widths, resampler)


def _sizes(shapes: Mapping[str, tuple[int, ...]], key: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of a weight; raises InputError unless it has so many axes, none 0."""
    if key not in shapes:
        raise InputError(f"the IP-Adapter has no {key}; copy the file again")
    shape = shapes[key]
    if len(shape) != rank or 0 in shape:
        raise InputError(
            f"the IP-Adapter's {key} has the impossible shape {list(shape)}; copy the file again"
        )
    return shape


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)


def _exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class _Projection(nnx.Module):
    """The plain adapter's: CLIP's vector becomes a few tokens."""

    def __init__(self, config: IPAdapterConfig, *, rngs: nnx.Rngs):
        self.tokens = config.tokens
        out = config.tokens * config.context_width
        self.proj = Linear(config.image_width, out, rngs=rngs)
        self.norm = _norm(config.context_width, rngs)

    def __call__(self, vectors: Array) -> Array:
        """Maps [batch, image width] to [batch, tokens, context width]."""
        return self.norm(self.proj(vectors).reshape(len(vectors), self.tokens, -1))


class _FullProjection(nnx.Module):
    """The full-face adapter's: each of CLIP's hidden states becomes a token."""

    def __init__(self, config: IPAdapterConfig, *, rngs: nnx.Rngs):
        width, context_width = config.image_width, config.context_width
        # In the file, the second place is the activation's.
        self.proj = nnx.List(
            [
                Linear(width, width, rngs=rngs),
                None,
                Linear(width, context_width, rngs=rngs),
                _norm(context_width, rngs),
            ]
        )

    def __call__(self, states: Array) -> Array:
        """Maps [batch, states, image width] to [batch, states, context width]."""
        first, _, second, norm = self.proj
        return norm(second(_exact_gelu(first(states))))


class _LatentAttention(nnx.Module):
    """Attention of the latent tokens to the image's and to each other."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.attention_width
        self.num_heads = inner // HEAD_WIDTH
        self.norm1 = _norm(width, rngs)
        self.norm2 = _norm(width, rngs)
        self.to_q = Linear(width, inner, use_bias=False, rngs=rngs)
        self.to_kv = Linear(width, 2 * inner, use_bias=False, rngs=rngs)
        self.to_out = Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, states: Array, latents: Array) -> Array:
        """Maps [batch, states, width] and [batch, tokens, width] to the latter's shape."""
        latents = self.norm2(latents)
        context = jnp.concatenate([self.norm1(states), latents], axis=1)
        key, value = jnp.split(self.to_kv(context), 2, axis=-1)
        return self.to_out(attention(self.to_q(latents), key, value, self.num_heads))


class _Resampler(nnx.Module):
    """The Plus adapter's: learned tokens gather what is in CLIP's hidden states.

    Alayrac et al., 2022, arXiv:2204.14198, section 2.1 and appendix A.1.1.
    """

    def __init__(self, config: IPAdapterConfig, *, rngs: nnx.Rngs):
        sizes = config.resampler
        draw = nnx.initializers.normal(sizes.width**-0.5)
        self.latents = nnx.Param(draw(rngs.params(), (1, config.tokens, sizes.width)))
        self.proj_in = Linear(config.image_width, sizes.width, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.List([_LatentAttention(sizes, rngs=rngs), self._feed_forward(sizes, rngs)])
                for _ in range(sizes.depth)
            ]
        )
        self.proj_out = Linear(sizes.width, config.context_width, rngs=rngs)
        self.norm_out = _norm(config.context_width, rngs)

    @staticmethod
    def _feed_forward(sizes: ResamplerConfig, rngs: nnx.Rngs) -> nnx.List:
        first = Linear(sizes.width, sizes.hidden, use_bias=False, rngs=rngs)
        last = Linear(sizes.hidden, sizes.width, use_bias=False, rngs=rngs)
        # In the file, the third place is the activation's.
        return nnx.List([_norm(sizes.width, rngs), first, None, last])

    def __call__(self, states: Array) -> Array:
        """Maps [batch, states, image width] to [batch, tokens, context width]."""
        states = self.proj_in(states)
        latents = jnp.broadcast_to(self.latents[...], (len(states), *self.latents.shape[1:]))
        for attend, (norm, first, _, last) in self.layers:
            latents = latents + attend(states, latents)
            latents = latents + last(_exact_gelu(first(norm(latents))))
        return self.norm_out(self.proj_out(latents))


PROJECTIONS = {PLAIN: _Projection, PLUS: _Resampler, FULL_FACE: _FullProjection}


class _KeysAndValues(nnx.Module):
    def __init__(self, width: int, context_width: int, *, rngs: nnx.Rngs):
        self.to_k_ip = Linear(context_width, width, use_bias=False, rngs=rngs)
        self.to_v_ip = Linear(context_width, width, use_bias=False, rngs=rngs)


class IPAdapterModel(nnx.Module):
    """Turns CLIP's view of images into what a U-Net attends to besides the text."""

    def __init__(self, config: IPAdapterConfig, *, rngs: nnx.Rngs):
        self.image_proj = PROJECTIONS[config.kind](config, rngs=rngs)
        # The file numbers all attentions of the U-Net; those to the text have the odd numbers.
        self.ip_adapter = nnx.List([])
        for width in config.widths:
            self.ip_adapter.append(None)
            self.ip_adapter.append(_KeysAndValues(width, config.context_width, rngs=rngs))

    def __call__(self, embeddings: Array) -> list[tuple[Array, Array]]:
        """Computes the keys and values of images.

        Args:
          embeddings: what `embedded` returns, of the dtype of the computation: [batch, image width]
            for a plain adapter, else [batch, states, image width].

        Returns:
          the key and the value for each of the U-Net's attentions to the text, in the order of
          `UNetConfig.cross_attention_widths`; each [batch, image tokens, width of the attention].
        """
        return self.keys_and_values(self.tokens(embeddings))

    def tokens(self, embeddings: Array) -> Array:
        """Maps what `__call__` takes to [batch, image tokens, context width]."""
        return self.image_proj(embeddings)

    def keys_and_values(self, tokens: Array) -> list[tuple[Array, Array]]:
        """Maps the tokens to what `__call__` returns.

        The tokens of several images may be concatenated, so that one softmax is over all of them.
        """
        layers = self.ip_adapter[1::2]
        return [(layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for layer in layers]


def image_prompts(
    adapters: Sequence[tuple[Sequence[tuple[Array, Array]], Array]],
) -> list[list[ImagePrompt]]:
    """Returns the `image_prompts` of a U-Net.

    Args:
      adapters: one or more; of each, what its `IPAdapterModel` returns, and the scales of its
        images, float [batch]. What several add to an attention is summed.
    """
    scales = [scale for _, scale in adapters]
    return [
        [ImagePrompt(*pair, scale) for pair, scale in zip(pairs, scales, strict=True)]
        for pairs in zip(*(pairs for pairs, _ in adapters), strict=True)
    ]


def embedded(encoder: CLIPVisionModelWithProjection, kind: str, images: Array) -> Array:
    """Returns what an adapter of this kind reads of images.

    Args:
      encoder: the adapter's image encoder.
      kind: PLAIN, PLUS or FULL_FACE.
      images: [batch, size, size, 3], from `clip_pixels`, of the dtype of the computation.

    Returns:
      [batch, projection dim] for PLAIN, else the hidden states [batch, 1 + patches, hidden size].
    """
    return encoder(images) if kind == PLAIN else encoder.penultimate(images)


def embedded_negative(encoder: CLIPVisionModelWithProjection, kind: str, dtype) -> Array:
    """Returns what an adapter reads in the unguided half of a batch, as in diffusers.

    That is zeros for PLAIN, and else the hidden states of an image of zeros, which CLIP sees as one
    of its mean colour.

    Args:
      encoder, kind: as for `embedded`.
      dtype: of the computation.

    Returns:
      what `embedded` does, with a batch of 1.
    """
    if kind == PLAIN:
        return jnp.zeros((1, encoder.config.projection_dim), dtype)
    size = encoder.config.image_size
    return encoder.penultimate(jnp.zeros((1, size, size, 3), dtype))
