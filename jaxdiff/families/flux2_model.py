"""The networks of FLUX.2 klein as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx

from jaxdiff.errors import InputError
from jaxdiff.families.model import Model, Text
from jaxdiff.families.networks import QWEN3, Architecture, Networks, fit, model
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.models import flux2
from jaxdiff.models.codecs import autoencoder_kl_flux2
from jaxdiff.weights.network import Network

LAYERS = (9, 18, 27)  # of the text encoder's hidden states


def _assemble(configs: Mapping, networks: Mapping[str, Network], *, side_px: int) -> Model:
    transformer, vae, qwen = configs["transformer"], configs["vae"], configs["text_encoder"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.channels),
            ("out_channels", transformer.out_channels or transformer.in_channels, vae.channels),
            (
                "joint_attention_dim",
                transformer.joint_attention_dim,
                len(LAYERS) * qwen.hidden_size,
            ),
            ("guidance_embeds", transformer.guidance_embeds, False),
        ]
    )
    if qwen.num_hidden_layers < LAYERS[-1]:
        raise InputError(
            f"text_encoder/config.json: num_hidden_layers = {qwen.num_hidden_layers} must be at "
            f"least {LAYERS[-1]}"
        )
    return model(
        configs,
        networks,
        _encode_text,
        channels=vae.channels,
        sample_size=side_px // vae.factor,
        size_multiple=1,
    )


def _encode_text(
    encoders: Mapping[str, nnx.Module], tokens: Mapping[str, Tokens], clip_skip: int
) -> Text:
    """Encodes prompts; the denoiser sees the padding, whose tokens have seen only the prompt."""
    ids, mask = tokens["text_encoder"]
    hidden = encoders["text_encoder"](ids, mask, layers=LAYERS)
    return Text(jnp.concatenate(hidden, axis=-1))


def networks(*, side_px: int) -> Networks:
    """Returns the networks; the arguments are constants of the family's page."""
    return Networks(
        architectures={
            "text_encoder": QWEN3,
            "transformer": Architecture(
                flux2.Flux2Config, lambda config: flux2.Flux2Transformer2DModel, flux2.SHARDING
            ),
            "vae": Architecture(
                autoencoder_kl_flux2.AutoencoderKLFlux2Config,
                lambda config: autoencoder_kl_flux2.AutoencoderKLFlux2,
                autoencoder_kl_flux2.SHARDING,
            ),
        },
        assemble=partial(_assemble, side_px=side_px),
    )
