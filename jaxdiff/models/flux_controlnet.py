"""`FluxControlNetModel`: steers the transformer of FLUX.1 by an image.

Zhang et al., 2023, arXiv:2302.05543, section 3, in the form of InstantX and Shakker Labs: a copy of
some of the transformer's blocks reads the noisy latents and those of an image of edges, depths,
poses or the like. A linear layer behind each block, zero before training, makes what is added to
the image's tokens. Union networks know several kinds of images; a token before the text says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import flux
from jaxdiff.models.dit import packed
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import ROWS

CLASS_NAME = "FluxControlNetModel"
SHARDING = (*flux.SHARDING, (r"^controlnet_(single_)?blocks\.\d+\.kernel$", ROWS))


@dataclass(frozen=True)
class FluxControlNetConfig(flux.FluxConfig):
    """The fields of `controlnet/config.json` that shape the network, with diffusers' defaults."""

    component = "controlnet"
    fixed = flux.FIXED | {"_class_name": CLASS_NAME}

    num_mode: int | None = None  # of a union network: how many kinds of images it knows


class FluxControlNetModel(flux.FluxBlocks):
    """Computes what is added to the tokens of an image in a transformer."""

    def __init__(self, config: FluxControlNetConfig, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the network; the arguments are those of `FluxBlocks`."""
        super().__init__(config, rngs=rngs, remat=remat)
        width = config.width

        def linears(count: int) -> nnx.List:
            return nnx.List([Linear(width, width, rngs=rngs) for _ in range(count)])

        self.controlnet_blocks = linears(config.num_layers)
        self.controlnet_single_blocks = linears(config.num_single_layers)
        self.controlnet_x_embedder = Linear(config.in_channels, width, rngs=rngs)
        self.controlnet_mode_embedder = (
            nnx.Embed(config.num_mode, width, rngs=rngs) if config.num_mode else None
        )

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        control: Array,
        *,
        context: Array,
        pooled: Array,
        guidance_scale: Array | None = None,
        modes: Array | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """Evaluates the network once.

        Args:
          latents, timesteps, context, pooled: what the transformer is given in the same step.
          control: the scaled latents of the image that steers, in the latents' shape and dtype.
          guidance_scale: float [batch] for networks with `guidance_embeds`, else None.
          modes: int [batch], the kind of each image, for union networks (`num_mode`), else None.

        Returns:
          for each double block and for each single block of this network, what is to be added to
          the image's tokens, [batch, h w / 4, width], unscaled.
        """
        kind = None if modes is None else self.controlnet_mode_embedder(modes)[:, None]
        x, context, embedding, angles = self.embedded(
            latents, timesteps, context, pooled, guidance_scale, first=kind
        )
        x = x + self.controlnet_x_embedder(packed(control, flux.PATCH))
        tokens, double, single = context.shape[1], [], []
        for block, linear in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x, context = call(block, x, context, embedding, angles, remat=self.remat)
            double.append(linear(x))
        x = jnp.concatenate([context, x], axis=1)
        blocks = self.single_transformer_blocks, self.controlnet_single_blocks
        for block, linear in zip(*blocks, strict=True):
            x = call(block, x, embedding, angles, remat=self.remat)
            single.append(linear(x[:, tokens:]))
        return double, single


def spread(
    double: Sequence[Array], single: Sequence[Array], blocks: tuple[int, int]
) -> tuple[list[Array], list[Array]]:
    """Gives each block of a transformer a residual of a network with fewer blocks.

    Neighbouring blocks have the same one. A network without single blocks gives zeros to them.

    Args:
      double, single: what the network returns.
      blocks: how many double and single blocks the transformer has.

    Returns:
      what the transformer takes as `residuals`.
    """

    def each(residuals: Sequence[Array], count: int) -> list[Array]:
        neighbours = -(-count // len(residuals))
        return [residuals[number // neighbours] for number in range(count)]

    return each(double, blocks[0]), each(single or [jnp.zeros_like(double[0])], blocks[1])
