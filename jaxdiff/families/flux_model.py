"""The networks of FLUX.1 as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.families.model import Inpainting, Model, Network, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    CLIP_TEXT,
    T5,
    Architecture,
    Networks,
    fit,
    model,
)
from jaxdiff.models import flux


def _assemble(
    configs: Mapping,
    networks: Mapping[str, Network],
    *,
    patch: int,
    sample_size: int,
    inpaints: bool,
) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    clip, t5 = configs["text_encoder"], configs["text_encoder_2"]
    channels = patch**2 * vae.latent_channels
    inpainting = Inpainting(
        vae.latent_channels + vae.factor**2, partial(_join, vae.factor), encodes_image=True
    )
    more = patch**2 * inpainting.channels if inpaints else 0
    fit(
        [
            ("in_channels", transformer.in_channels, channels + more),
            ("out_channels", transformer.out_channels or transformer.in_channels, channels),
            ("pooled_projection_dim", transformer.pooled_projection_dim, clip.hidden_size),
            ("joint_attention_dim", transformer.joint_attention_dim, t5.d_model),
        ]
    )
    return model(
        configs,
        networks,
        _encode_text,
        text_encoders=("text_encoder", "text_encoder_2"),
        channels=vae.latent_channels,
        guidance_is_input=transformer.guidance_embeds,
        sample_size=sample_size,
        size_multiple=patch,
        inpainting=inpainting if inpaints else None,
    )


def _join(factor: int, masks: Array, hidden: Array) -> Array:
    """Returns the masked image's latents, and as channels the mask's pixels of each latent."""
    batch, height, width = masks.shape
    rows, columns = height // factor, width // factor
    pixels = masks.reshape(batch, rows, factor, columns, factor).transpose(0, 1, 3, 2, 4)
    return jnp.concatenate([hidden, pixels.reshape(batch, rows, columns, factor**2)], axis=-1)


def _encode_text(encoders: Mapping[str, nnx.Module], tokens: Mapping, clip_skip: int) -> Text:
    """Encodes prompts; T5's padding is seen like all other tokens, as in training."""
    ids = tokens["text_encoder"][:, 0]  # the only chunk
    _, pooled = encoders["text_encoder"](ids)
    return Text(encoders["text_encoder_2"](tokens["text_encoder_2"].ids), pooled)


def networks(*, patch: int, sample_size: int, inpaints: bool) -> Networks:
    """Returns the networks; the arguments are constants of the family's page."""
    return Networks(
        architectures={
            "text_encoder": CLIP_TEXT,
            "text_encoder_2": T5,
            "transformer": Architecture(
                flux.FluxConfig, lambda config: flux.FluxTransformer2DModel, flux.SHARDING
            ),
            "vae": AUTOENCODER_KL,
        },
        assemble=partial(_assemble, patch=patch, sample_size=sample_size, inpaints=inpaints),
    )
