"""`ZImageTransformer2DModel`: the denoiser of Z-Image and Z-Image-Turbo.

Z-Image team, 2025, arXiv:2511.22699: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) in one stream, with the same weights for the tokens of the image and the text,
after a few blocks that refine each alone. Positions are rotary embeddings (Su et al., 2021,
arXiv:2104.09864) over three axes: the place in the text, the row and the column.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.dit import SelfAttention, layer_norm, packed, unpacked
from jaxdiff.models.embeddings import constant_angles, grid_positions, rotary_angles, sinusoids
from jaxdiff.models.layers import Chain
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

PATCH = 2  # the side of a patch in latents
MULTIPLE = 32  # the tokens of a text and of an image are filled up to a multiple of this
SINUSOIDS = 256  # of the timestep, whose embedding is at most as wide
TIME_WIDTH = 1024  # inside the timestep's MLP
QK_EPSILON = 1e-5  # of the norms of queries and keys
# Keys that change what is computed; only these values are supported.
FIXED = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [PATCH],
    "qk_norm": True,
}
IGNORED = {"n_kv_heads"}  # without effect: keys and values have as many heads as queries

SHARDING = (
    (r"\.(to_[qkv]|w[13])\.kernel$", COLUMNS),
    (r"\.(to_out\.0|w2)\.kernel$", ROWS),
    (r"\.adaLN_modulation\.\d\.kernel$", COLUMNS),
)


@dataclass(frozen=True)
class ZImageConfig(ComponentConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults.

    `axes_lens` limits the positions on each axis: the padded text's tokens plus 2, rows, columns.
    """

    component = "transformer"
    fixed = FIXED
    ignored = IGNORED

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    def __post_init__(self):
        for name in ("axes_dims", "axes_lens"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must be 3 numbers")
        if any(width % 2 for width in self.axes_dims):
            raise ValueError("axes_dims must be even")
        if self.dim != self.n_heads * sum(self.axes_dims):
            raise ValueError("dim must be n_heads times the sum of axes_dims")

    @property
    def time_width(self) -> int:
        """The width of the timestep's embedding."""
        return min(self.dim, SINUSOIDS)

    def to_json(self) -> dict:
        """Returns the `config.json` that diffusers reads."""
        return super().to_json() | {"n_kv_heads": self.n_heads}


class _FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202), 8/3 times as wide inside."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        hidden = int(width / 3 * 8)  # in this order, which decides how it is rounded
        self.w1 = Linear(width, hidden, use_bias=False, rngs=rngs)
        self.w2 = Linear(hidden, width, use_bias=False, rngs=rngs)
        self.w3 = Linear(width, hidden, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.w2(nnx.silu(self.w1(x)) * self.w3(x))


class _Block(nnx.Module):
    """Self-attention and feed-forward, with norms before and after both.

    If the block is modulated, the timestep scales what both receive, and gates what they return.
    """

    def __init__(self, config: ZImageConfig, *, modulated: bool, rngs: nnx.Rngs):
        width = config.dim

        def norm():
            return nnx.RMSNorm(width, epsilon=config.norm_eps, rngs=rngs)

        self.attention = SelfAttention(
            width, config.n_heads, qk_norm=True, use_bias=False, epsilon=QK_EPSILON, rngs=rngs
        )
        self.feed_forward = _FeedForward(width, rngs=rngs)
        self.attention_norm1, self.attention_norm2 = norm(), norm()
        self.ffn_norm1, self.ffn_norm2 = norm(), norm()
        self.adaLN_modulation = (
            Chain([Linear(config.time_width, 4 * width, rngs=rngs)]) if modulated else None
        )

    def __call__(
        self, x: Array, angles: Array, mask: Array | None, embedding: Array | None
    ) -> Array:
        """Maps [batch, tokens, width] to the same shape.

        Args:
          x: the tokens.
          angles: [batch, tokens, head width / 2], as in `embeddings.rotate_pairs`.
          mask: bool [batch, tokens]: which tokens are seen; None for all.
          embedding: the timestep's, [batch, time width], if the block is modulated.
        """
        scale, gate, ffn_scale, ffn_gate = self._factors(embedding)
        attended = self.attention(self.attention_norm1(x) * scale, angles=angles, mask=mask)
        x = x + gate * self.attention_norm2(attended)
        return x + ffn_gate * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * ffn_scale))

    def _factors(self, embedding: Array | None):
        """Returns a scale and a gate for the attention and the same for the feed-forward."""
        if self.adaLN_modulation is None:
            return 1, 1, 1, 1
        factors = self.adaLN_modulation(embedding)[:, None]  # for all tokens
        scale, gate, ffn_scale, ffn_gate = jnp.split(factors, 4, axis=-1)
        return 1 + scale, jnp.tanh(gate), 1 + ffn_scale, jnp.tanh(ffn_gate)


class _FinalLayer(nnx.Module):
    """Maps tokens to patches, after a norm that the timestep scales."""

    def __init__(self, config: ZImageConfig, *, rngs: nnx.Rngs):
        self.linear = Linear(config.dim, PATCH**2 * config.in_channels, rngs=rngs)
        self.adaLN_modulation = Chain([nnx.silu, Linear(config.time_width, config.dim, rngs=rngs)])

    def __call__(self, x: Array, embedding: Array) -> Array:
        return self.linear(layer_norm(x) * (1 + self.adaLN_modulation(embedding))[:, None])


class ZImageTransformer2DModel(nnx.Module):
    """Predicts the velocity of latents from the timestep and the text."""

    def __init__(self, config: ZImageConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width, patch = config.dim, f"{PATCH}-1"  # a patch has one frame

        def blocks(count: int, modulated: bool) -> nnx.List:
            return nnx.List([_Block(config, modulated=modulated, rngs=rngs) for _ in range(count)])

        def token() -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (1, width)))

        self.config, self.remat = config, remat
        embedder = Linear(PATCH**2 * config.in_channels, width, rngs=rngs)
        self.all_x_embedder = nnx.Dict({patch: embedder})
        self.all_final_layer = nnx.Dict({patch: _FinalLayer(config, rngs=rngs)})
        self.noise_refiner = blocks(config.n_refiner_layers, True)
        self.context_refiner = blocks(config.n_refiner_layers, False)
        self.t_embedder = nnx.Dict(
            mlp=Chain(
                [
                    Linear(SINUSOIDS, TIME_WIDTH, rngs=rngs),
                    nnx.silu,
                    Linear(TIME_WIDTH, config.time_width, rngs=rngs),
                ]
            )
        )
        self.cap_embedder = Chain(
            [
                nnx.RMSNorm(config.cap_feat_dim, epsilon=config.norm_eps, rngs=rngs),
                Linear(config.cap_feat_dim, width, rngs=rngs),
            ]
        )
        self.x_pad_token, self.cap_pad_token = token(), token()
        self.layers = blocks(config.n_layers, True)

    def __call__(self, latents: Array, timesteps: Array, *, context: Array, mask: Array) -> Array:
        """Evaluates the denoiser once.

        An image's result depends on its own text alone, without the padding.

        Args:
          latents: [batch, h, w, in channels], of even height and width. Their dtype is that of
            the activations.
          timesteps: [batch], 1000 times the noise level: from 0, an image, to 1000, noise.
          context: [batch, tokens, cap feat dim], the text encoder's hidden states, padded at the
            end to any length.
          mask: bool [batch, tokens]: which tokens are the text's; the first ones, at least one.

        Returns:
          the velocity, which is the noise minus the image, in the shape and dtype of the latents.

        Raises:
          ValueError: if the height or width is odd, or if the config's `axes_lens` are too short.
        """
        _, height, width, _ = latents.shape
        self._refuse_misfits(height, width, context.shape[1])
        times = (1000 - timesteps) / 1000 * self.config.t_scale  # the weights count from noise
        embedding = self.t_embedder.mlp(sinusoids(times, SINUSOIDS).astype(latents.dtype))
        text, seen = self._text(context, mask)
        image = self._image(latents)
        positions = [_image_positions(seen, height, width), _text_positions(seen)]
        angles = self._angles(jnp.concatenate(positions, axis=1))
        image_angles, text_angles = jnp.split(angles, [image.shape[1]], axis=1)

        image = self._run(self.noise_refiner, image, image_angles, None, embedding)
        text = self._run(self.context_refiner, text, text_angles, seen, None)
        x = jnp.concatenate([image, text], axis=1)
        seen = jnp.pad(seen, ((0, 0), (image.shape[1], 0)), constant_values=True)
        x = self._run(self.layers, x, angles, seen, embedding)

        (final_layer,) = self.all_final_layer.values()
        patches = final_layer(x[:, : height * width // PATCH**2], embedding)
        # The weights predict the image minus the noise.
        return -unpacked(patches, height, width, PATCH, channels_last=True)

    def _text(self, context: Array, mask: Array) -> tuple[Array, Array]:
        """Returns the text's tokens, filled up to a multiple, and which of them are seen.

        Those that fill up the text itself are seen; all later ones are not.
        """
        missing = -context.shape[1] % MULTIPLE
        context = jnp.pad(context, ((0, 0), (0, missing), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (0, missing)))
        tokens = jnp.where(mask[..., None], self.cap_embedder(context), self.cap_pad_token[...])
        length = mask.sum(axis=-1, keepdims=True)
        return tokens, jnp.arange(mask.shape[1]) < length + -length % MULTIPLE

    def _image(self, latents: Array) -> Array:
        """Returns the image's tokens, filled up to a multiple."""
        (embedder,) = self.all_x_embedder.values()
        tokens = embedder(packed(latents, PATCH, channels_last=True))
        batch, count, width = tokens.shape
        fill = jnp.broadcast_to(self.x_pad_token[...], (batch, -count % MULTIPLE, width))
        return jnp.concatenate([tokens, fill], axis=1)

    def _refuse_misfits(self, height: int, width: int, text_tokens: int) -> None:
        if height % PATCH or width % PATCH:
            raise ValueError(f"latents of {height}x{width} are not whole patches of {PATCH}")
        needed = (text_tokens + -text_tokens % MULTIPLE + 2, height // PATCH, width // PATCH)
        if any(n > most for n, most in zip(needed, self.config.axes_lens, strict=True)):
            raise ValueError(f"axes_lens = {self.config.axes_lens} are less than {needed}")

    def _angles(self, positions: Array) -> Array:
        """Maps int [batch, tokens, axes] to float32 [batch, tokens, head width / 2]."""
        config = self.config
        angles = []
        for axis, (width, count) in enumerate(zip(config.axes_dims, config.axes_lens, strict=True)):
            table = rotary_angles(np.arange(count)[:, None], [width], config.rope_theta)
            # Rounded to float32 first, as when the weights were trained.
            angles.append(constant_angles(table.astype(np.float32))[positions[..., axis]])
        return jnp.concatenate(angles, axis=-1)

    def _run(
        self, blocks: nnx.List, x: Array, angles: Array, mask: Array | None, embedding: Array | None
    ) -> Array:
        for block in blocks:
            x = call(block, x, angles, mask, embedding, remat=self.remat)
        return x


def _text_positions(seen: Array) -> Array:
    """Returns (1 + index, 0, 0) of each token, int [batch, tokens, 3]."""
    places = jnp.arange(1, seen.shape[1] + 1)[:, None] * jnp.array([1, 0, 0])
    return jnp.broadcast_to(places, (len(seen), *places.shape))


def _image_positions(seen: Array, height: int, width: int) -> Array:
    """Returns (text tokens + 1, row, column) of each patch, then zeros up to a multiple.

    Args:
      seen: bool [batch, text tokens]: an image comes after the text's tokens that are seen.
      height, width: of the latents.

    Returns:
      int [batch, tokens, 3].
    """
    grid = grid_positions(height // PATCH, width // PATCH)
    start = (1 + seen.sum(axis=-1))[:, None, None] * jnp.array([1, 0, 0])
    return jnp.pad(grid + start, ((0, 0), (0, -len(grid) % MULTIPLE), (0, 0)))
