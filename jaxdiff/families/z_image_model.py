"""The networks of Z-Image as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

from flax import nnx
from jax import Array

from jaxdiff.families.model import Denoiser, Model, Network, Params, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    QWEN3,
    Architecture,
    Networks,
    codec,
    evaluation,
    fit,
)
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.models import z_image

LAYER = -2  # the last but one of the text encoder's hidden states


def _assemble(
    configs: Mapping, networks: Mapping[str, Network], index: Mapping, *, patch: int, side_px: int
) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.latent_channels),
            ("cap_feat_dim", transformer.cap_feat_dim, configs["text_encoder"].hidden_size),
        ]
    )
    return Model(
        configs=configs,
        networks=networks,
        text_encoders=("text_encoder",),
        encode_text=partial(_encode_text, networks["text_encoder"].graph),
        condition=_condition,
        denoiser=Denoiser(
            component="transformer",
            sample_size=side_px // vae.factor,
            size_multiple=patch,
            evaluate=evaluation(networks["transformer"]),
        ),
        codec=codec(networks["vae"], vae, vae.latent_channels),
    )


def _encode_text(
    graph: nnx.GraphDef, params: Params, tokens: Mapping[str, Tokens], clip_skip: int
) -> Text:
    ids, mask = tokens["text_encoder"]
    (hidden,) = nnx.merge(graph, params["text_encoder"])(ids, mask, layers=(LAYER,))
    return Text(hidden, mask=mask)


def _condition(text: Text, sizes: None) -> dict[str, Array]:
    return {"context": text.context, "mask": text.mask}


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
