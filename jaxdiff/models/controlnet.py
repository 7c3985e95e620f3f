"""`ControlNetModel`: steers the U-Net of Stable Diffusion 1, 2 or XL by an image.

Zhang et al., 2023, arXiv:2302.05543, section 3: a copy of the U-Net's down and mid blocks reads the
noisy latents and an image of edges, depths, poses or the like. A 1x1 convolution behind each of its
feature maps, zero before training, makes what `UNet2DConditionModel` adds to its own.
"""

from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import unet_encoder
from jaxdiff.models.layers import conv
from jaxdiff.models.sharding import ROWS

CHANNEL_ORDERS = ("rgb", "bgr")
SHARDING = (
    *unet_encoder.SHARDING,
    (r"^controlnet_(down_blocks\.\d+|mid_block)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class ControlNetConfig(unet_encoder.UNetEncoderConfig):
    """The fields of `controlnet/config.json` that shape the network, with diffusers' defaults."""

    component = "controlnet"
    fixed = unet_encoder.FIXED | {"_class_name": "ControlNetModel"}
    ignored = unet_encoder.IGNORED

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self):
        super().__post_init__()
        order = self.controlnet_conditioning_channel_order
        if order not in CHANNEL_ORDERS:
            raise ValueError(f"controlnet_conditioning_channel_order = {order!r} is not supported")

    @property
    def control_factor(self) -> int:
        """Pixels of the control image per latent along each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ConditioningEmbedding(nnx.Module):
    """Brings the control image to the size and width of the first feature map."""

    def __init__(self, config: ControlNetConfig, *, rngs: nnx.Rngs):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], 3, rngs=rngs)
        self.blocks = nnx.List([])
        for before, after in pairwise(widths):
            self.blocks.append(conv(before, before, 3, rngs=rngs))
            self.blocks.append(conv(before, after, 3, stride=2, rngs=rngs))
        self.conv_out = conv(widths[-1], config.block_out_channels[0], 3, rngs=rngs)

    def __call__(self, control: Array) -> Array:
        """Maps [batch, f h, f w, channels] to [batch, h, w, width], f being `control_factor`."""
        x = nnx.silu(self.conv_in(control))
        for block in self.blocks:
            x = nnx.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(unet_encoder.UNetEncoder):
    """Computes what is added to a U-Net's feature maps."""

    def __init__(self, config: ControlNetConfig, remat: bool = False, *, rngs: nnx.Rngs):
        super().__init__(config, remat, rngs=rngs)
        self.controlnet_cond_embedding = ConditioningEmbedding(config, rngs=rngs)
        self.controlnet_down_blocks = nnx.List(
            [conv(width, width, 1, rngs=rngs) for width in config.skip_widths]
        )
        deepest = config.block_out_channels[-1]
        self.controlnet_mid_block = conv(deepest, deepest, 1, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        control: Array,
        *,
        pooled: Array | None = None,
        time_ids: Array | None = None,
    ) -> tuple[list[Array], Array]:
        """Evaluates the network once.

        Args:
          latents, timesteps, context, pooled, time_ids: what the U-Net is given in the same step.
          control: [batch, f h, f w, conditioning channels] in 0 to 1, of any float dtype, the image
            that steers; for latents [batch, h, w, channels] and f = `control_factor` (8 in all
            published networks). Its colours are in the order RGB, whatever the network's own is.

        Returns:
          the `residuals` of `UNet2DConditionModel.__call__`, unscaled and of the latents' dtype:
          those of the skips, [batch, h_i, w_i, c_i], and that of the mid block's output. With
          `global_pool_conditions`, each is averaged over its height and width, which are then 1.
        """
        time_embedding = self.embedded(timesteps, pooled, time_ids, latents.dtype)
        x = self.conv_in(latents) + self.features(control.astype(latents.dtype))
        return self.residuals(x, time_embedding, context)

    def features(self, control: Array) -> Array:
        """Maps images [batch, f h, f w, conditioning channels] to [batch, h, w, first width]."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            control = control[..., ::-1]
        return self.controlnet_cond_embedding(control)

    def residuals(
        self, x: Array, time_embedding: Array, context: Array
    ) -> tuple[list[Array], Array]:
        """Returns what `__call__` does, from the first feature map, [batch, h, w, first width]."""
        skips, mid = self.encode(x, time_embedding, context)
        down = [each(skip) for each, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        mid = self.controlnet_mid_block(mid)
        if self.config.global_pool_conditions:
            down = [jnp.mean(residual, axis=(1, 2), keepdims=True) for residual in down]
            mid = jnp.mean(mid, axis=(1, 2), keepdims=True)
        return down, mid
