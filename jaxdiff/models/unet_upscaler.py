"""The U-Net of Stable Diffusion's x4 upscaler: `UNet2DConditionModel` with a noise level.

Latents are followed by the channels of the image that it enlarges, to which noise was added; a
learned embedding tells it how much (conditioning augmentation: Ho et al., 2021, arXiv:2106.15282,
section 4). In most of its transformers, positions see the text only and not each other.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import unet
from jaxdiff.models.transformer import BasicTransformerBlock
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig

SHARDING = unet.SHARDING


@dataclass(frozen=True)
class UNetUpscalerConfig(UNetConfig):
    """The fields of `unet/config.json` that shape the network, with diffusers' defaults."""

    num_class_embeds: int | None = None
    only_cross_attention: bool | tuple[bool, ...] = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_class_embeds is None:
            raise ValueError("num_class_embeds is missing, but an upscaler embeds noise levels")
        if len(self.sees_text_only) != len(self.block_out_channels):
            raise ValueError(
                f"only_cross_attention must be {len(self.block_out_channels)} times true or false, "
                "or once for all"
            )

    @property
    def sees_text_only(self) -> tuple[bool, ...]:
        """Whether the transformers of each down block see the text only."""
        if isinstance(self.only_cross_attention, tuple):
            return self.only_cross_attention
        return (self.only_cross_attention,) * len(self.block_out_channels)


class UNetUpscaler(UNet2DConditionModel):
    """Predicts the noise (or v) in latents from the timestep, the text and a smaller image."""

    def __init__(self, config: UNetUpscalerConfig, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the network; the arguments are those of `UNet2DConditionModel`."""
        super().__init__(config, rngs=rngs, remat=remat)
        self.class_embedding = nnx.Embed(config.num_class_embeds, config.time_width, rngs=rngs)
        text_only = config.sees_text_only
        blocks = [
            *zip(self.down_blocks, text_only, config.block_out_channels, strict=True),
            *zip(self.up_blocks, text_only[::-1], config.block_out_channels[::-1], strict=True),
        ]
        for block, is_text_only, width in blocks:
            for transformer in block.attentions if is_text_only else ():
                transformer.transformer_blocks = nnx.List(
                    [
                        BasicTransformerBlock(
                            width,
                            layer.attn1.num_heads,
                            config.cross_attention_dim,
                            text_only=True,
                            rngs=rngs,
                        )
                        for layer in transformer.transformer_blocks
                    ]
                )

    def evaluate(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        deep: Array | None = None,
        *,
        class_labels: Array,
    ) -> tuple[Array, Array]:
        """Evaluates the denoiser and also returns features that a later evaluation can reuse.

        Args:
          latents: [batch, h, w, in channels], with the channels of the image.
          timesteps, context, deep: as for `UNet2DConditionModel`.
          class_labels: int32 [batch], the timestep whose noise the image has.

        Returns:
          [batch, h, w, out channels]; and `deep`.
        """
        embedded = self.embedded(timesteps, None, None, latents.dtype)
        labels = jnp.take(self.class_embedding.embedding[...], class_labels, axis=0)
        return self.after_embedding(latents, embedded + labels.astype(latents.dtype), context, deep)

    def __call__(
        self, latents: Array, timesteps: Array, context: Array, *, class_labels: Array
    ) -> Array:
        """Evaluates the denoiser once; see `evaluate`."""
        return self.evaluate(latents, timesteps, context, class_labels=class_labels)[0]
