"""The networks of Z-Image as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

from flax import nnx

from jaxdiff.families.model import Model, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    QWEN3,
    Architecture,
    Networks,
    fit,
    model,
)
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.models import z_image
from jaxdiff.weights.network import Network

LAYER = -2  # the last but one of the text encoder's hidden states


def _assemble(
    configs: Mapping, networks: Mapping[str, Network], *, patch: int, side_px: int
) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.latent_channels),
            ("cap_feat_dim", transformer.cap_feat_dim, configs["text_encoder"].hidden_size),
        ]
    )
    return model(
        configs,
        networks,
        _encode_text,
        channels=vae.latent_channels,
        sample_size=side_px // vae.factor,
        size_multiple=patch,
    )


def _encode_text(
    encoders: Mapping[str, nnx.Module], tokens: Mapping[str, Tokens], clip_skip: int
) -> Text:
    ids, mask = tokens["text_encoder"]
    (hidden,) = encoders["text_encoder"](ids, mask, layers=(LAYER,))
    return Text(hidden, mask=mask)


def networks(*, patch: int, side_px: int) -> Networks:
    """Returns the networks; the arguments are constants of the family's page."""
    return Networks(
        architectures={
            "text_encoder": QWEN3,
            "transformer": Architecture(
                z_image.ZImageConfig,
                lambda config: z_image.ZImageTransformer2DModel,
                z_image.SHARDING,
            ),
            "vae": AUTOENCODER_KL,
        },
        assemble=partial(_assemble, patch=patch, side_px=side_px),
    )
