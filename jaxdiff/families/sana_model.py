"""The networks of Sana as pure functions: the part that imports JAX."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from jaxdiff.families.model import Model, Text
from jaxdiff.families.networks import Architecture, Networks, fit, model
from jaxdiff.families.tokenizers.instructed import InstructedTokens
from jaxdiff.models import sana
from jaxdiff.models.codecs import autoencoder_dc
from jaxdiff.models.text import gemma2
from jaxdiff.weights.network import Network


def _assemble(configs: Mapping, networks: Mapping[str, Network]) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.channels),
            ("out_channels", transformer.out_channels, vae.channels),
            ("caption_channels", transformer.caption_channels, configs["text_encoder"].hidden_size),
        ]
    )
    return model(
        configs,
        networks,
        _encode_text,
        channels=vae.channels,
        sample_size=transformer.sample_size,
        size_multiple=1,
    )


def _encode_text(
    encoders: Mapping[str, nnx.Module], tokens: Mapping[str, InstructedTokens], clip_skip: int
) -> Text:
    ids, mask, kept = tokens["text_encoder"]
    (hidden,) = encoders["text_encoder"](ids, mask, layers=(-1,))
    return Text(
        jnp.take_along_axis(hidden, kept[:, :, None], axis=1),
        mask=jnp.take_along_axis(mask, kept, axis=1),
    )


NETWORKS = Networks(
    architectures={
        "text_encoder": Architecture(
            gemma2.Gemma2Config, lambda config: gemma2.Gemma2Model, gemma2.SHARDING
        ),
        "transformer": Architecture(
            sana.SanaConfig, lambda config: sana.SanaTransformer2DModel, sana.SHARDING
        ),
        "vae": Architecture(
            autoencoder_dc.AutoencoderDCConfig,
            lambda config: autoencoder_dc.AutoencoderDC,
            autoencoder_dc.SHARDING,
        ),
    },
    assemble=_assemble,
)
