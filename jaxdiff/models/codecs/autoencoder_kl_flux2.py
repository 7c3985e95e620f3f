"""`AutoencoderKLFlux2`: latent diffusion's autoencoder with patches as latents, for Flux.2.

The encoder and the decoder are `AutoencoderKL`'s (Rombach et al., 2022, arXiv:2112.10752, 3.1). The
denoiser sees patches of 2x2 latents as one latent of four times the channels, normalised by the
stored statistics of a batch normalisation (Ioffe and Szegedy, 2015, arXiv:1502.03167) instead of a
factor in the config.

Of a file's weights, `bn.num_batches_tracked`, a counter of training steps, is not used.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.codecs import autoencoder_kl
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, Decoder, check_blocks
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.dit import packed, unpacked

PATCH = 2  # latents along each side of a patch
FIXED = {"_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "patch_size": [PATCH, PATCH]}
SHARDING = autoencoder_kl.SHARDING


@dataclass(frozen=True)
class AutoencoderKLFlux2Config(ComponentConfig):
    """The fields of `vae/config.json`; the defaults are diffusers'.

    `sample_size`, `batch_norm_momentum` and `force_upcast` change nothing here. diffusers has no
    `force_upcast`, but the published files do.
    """

    component = "vae"
    fixed = FIXED

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    sample_size: int = 1024
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1

    def __post_init__(self):
        check_blocks(self)
        decoder = self.decoder_block_out_channels or self.block_out_channels
        if len(decoder) != len(self.block_out_channels) or any(
            width % self.norm_num_groups for width in decoder
        ):
            raise ValueError(
                "decoder_block_out_channels must have a multiple of norm_num_groups for each block"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent of the denoiser along each side."""
        return PATCH * 2 ** (len(self.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of the denoiser's latents."""
        return PATCH**2 * self.latent_channels

    def scale(self, latents: Array) -> Array:
        """Returns the latents unchanged: the network has already normalised them."""
        return latents

    def unscale(self, latents: Array) -> Array:
        """Undoes `scale`."""
        return latents


class _BatchStatistics(nnx.Module):
    """The mean and variance of each channel, as measured in training."""

    def __init__(self, channels: int):
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))


class AutoencoderKLFlux2(AutoencoderKL):
    """The autoencoder of Flux.2; its latents are the denoiser's."""

    def __init__(self, config: AutoencoderKLFlux2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.decoder_block_out_channels:
            widths = config.decoder_block_out_channels
            of_decoder = dataclasses.replace(config, block_out_channels=widths)
            self.decoder = Decoder(of_decoder, rngs=rngs)
        self.bn = _BatchStatistics(config.channels)
        self.epsilon = config.batch_norm_eps

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Returns the posterior of the latents, whose mean pipelines take.

        Args:
          images: [batch, height, width, 3], -1 to 1; multiples of `factor` high and wide.

        Returns:
          mean and log-variance, each [batch, height / factor, width / factor, channels].
        """
        mean, log_variance = (_patches(moment) for moment in super().encode(images))
        variance = self._variance
        normed = (mean - self.bn.running_mean[...]) / jnp.sqrt(variance)
        shifted = log_variance - jnp.log(variance)
        return normed.astype(mean.dtype), shifted.astype(mean.dtype)

    def decode(self, latents: Array) -> Array:
        """Decodes [batch, h, w, channels] to [batch, h * factor, w * factor, 3], -1 to 1."""
        batch, height, width, channels = latents.shape
        x = latents * jnp.sqrt(self._variance) + self.bn.running_mean[...]
        tokens = x.astype(latents.dtype).reshape(batch, -1, channels)
        return super().decode(unpacked(tokens, PATCH * height, PATCH * width, PATCH))

    @property
    def _variance(self) -> Array:
        """The variance of each channel, float32."""
        return self.bn.running_var[...].astype(jnp.float32) + self.epsilon


def _patches(x: Array) -> Array:
    """Maps [batch, h, w, c] to [batch, h / 2, w / 2, 4c], of which c varies slowest."""
    batch, height, width, _ = x.shape
    return packed(x, PATCH).reshape(batch, height // PATCH, width // PATCH, -1)
