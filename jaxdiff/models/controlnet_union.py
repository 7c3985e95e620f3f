"""`ControlNetUnionModel`: steers the U-Net of Stable Diffusion XL by images of several kinds.

Xinsir's ControlNet++ (github.com/xinsir6/ControlNetPlus), a ControlNet (Zhang et al., 2023,
arXiv:2302.05543) that is told of which kind each image is, such as edges or depths. A vector is
learned for each kind. A transformer makes an offset for each channel of an image's feature map from
the map's mean and the vector of its kind; then the maps of all images are added up.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import controlnet, unet_encoder
from jaxdiff.models.embeddings import EmbeddingMLP, sinusoids
from jaxdiff.models.layers import Chain
from jaxdiff.models.linear import Linear
from jaxdiff.models.text.clip import ACTIVATIONS

CLASS_NAME = "ControlNetUnionModel"
SHARDING = controlnet.SHARDING  # the other layers are small
MLP_RATIO = 4  # of the transformer's hidden width to its width


@dataclass(frozen=True)
class ControlNetUnionConfig(controlnet.ControlNetConfig):
    """The fields of `controlnet/config.json` that shape the network, with diffusers' defaults."""

    fixed = unet_encoder.FIXED | {"_class_name": CLASS_NAME}
    ignored = unet_encoder.IGNORED | {"num_trans_head"}  # see `_Attention`

    conditioning_embedding_out_channels: tuple[int, ...] = (48, 96, 192, 384)
    num_control_type: int = 6
    num_trans_channel: int = 320
    num_trans_layer: int = 1
    num_proj_channel: int = 320

    def __post_init__(self):
        super().__post_init__()
        if not self.addition_time_embed_dim:
            raise ValueError("addition_time_embed_dim is missing: kinds of images are embedded so")
        width = self.block_out_channels[0]
        for name in ("num_trans_channel", "num_proj_channel"):
            if getattr(self, name) != width:
                raise ValueError(f"{name} = {getattr(self, name)} must be the first width, {width}")


class _Attention(nnx.Module):
    """What attention makes of a vector that attends to itself alone: its value, projected.

    In diffusers, and in the authors' code, it attends to the vectors in the same place of the
    batch, instead of the other vectors of its image. For a single image, these are copies of one
    another, so queries and keys have no effect.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        draw = nnx.initializers.lecun_normal()
        self.in_proj_weight = nnx.Param(draw(rngs.params(), (3 * width, width)))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        first = 2 * x.shape[-1]  # the rows of queries and keys
        return self.out_proj(x @ self.in_proj_weight[first:].T + self.in_proj_bias[first:])


class _FeedForward(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.c_fc = Linear(width, MLP_RATIO * width, rngs=rngs)
        self.c_proj = Linear(MLP_RATIO * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(ACTIVATIONS["quick_gelu"](self.c_fc(x)))


class _Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.attn, self.mlp = _Attention(width, rngs=rngs), _FeedForward(width, rngs=rngs)
        self.ln_1, self.ln_2 = (nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNetUnionModel(controlnet.ControlNetModel):
    """Computes what is added to a U-Net's feature maps."""

    def __init__(self, config: ControlNetUnionConfig, remat: bool = False, *, rngs: nnx.Rngs):
        super().__init__(config, remat, rngs=rngs)
        width, kinds = config.num_trans_channel, config.num_control_type
        self.task_embedding = nnx.Param(jax.random.normal(rngs.params(), (kinds, width)))
        self.transformer_layes = Chain(  # sic
            [_Block(width, rngs=rngs) for _ in range(config.num_trans_layer)]
        )
        self.spatial_ch_projs = Linear(width, config.num_proj_channel, rngs=rngs)
        self.control_add_embedding = EmbeddingMLP(
            kinds * config.addition_time_embed_dim, config.time_width, rngs=rngs
        )

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        control: Array,
        *,
        modes: Array,
        weights: Array,
        pooled: Array | None = None,
        time_ids: Array | None = None,
    ) -> tuple[list[Array], Array]:
        """Evaluates the network once.

        Args:
          latents, timesteps, context, pooled, time_ids: as for `ControlNetModel`.
          control: [batch, images, f h, f w, conditioning channels], as there.
          modes: integers [batch, images], the kind of each image.
          weights: [batch, images], how much each image counts.

        Returns:
          as `ControlNetModel.__call__`.
        """
        batch_and_images, dtype = modes.shape, latents.dtype
        weights = weights.astype(dtype)[..., None]
        maps = self.features(control.astype(dtype).reshape(-1, *control.shape[2:]))
        maps = maps.reshape(*batch_and_images, *maps.shape[1:])
        means = maps.mean(axis=(2, 3)) + self.task_embedding[modes]
        offsets = self.spatial_ch_projs(self.transformer_layes(means * weights))
        maps = (maps + offsets[:, :, None, None]) * weights[..., None, None]
        embedding = self.embedded(timesteps, pooled, time_ids, dtype)
        embedding = embedding + self._embedded_kinds(modes, dtype)
        return self.residuals(self.conv_in(latents) + maps.sum(axis=1), embedding, context)

    def _embedded_kinds(self, modes: Array, dtype: jnp.dtype) -> Array:
        """Embeds which kinds of images there are: [batch, images] to [batch, time width]."""
        config = self.config
        present = jax.nn.one_hot(modes, config.num_control_type).max(axis=1)
        embedded = sinusoids(
            present,
            config.addition_time_embed_dim,
            cosine_first=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return self.control_add_embedding(embedded.reshape(len(modes), -1).astype(dtype))
