"""The networks of Sana as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.families.model import Denoiser, Model, Network, Params, Text
from jaxdiff.families.networks import Architecture, Networks, codec, evaluation, fit
from jaxdiff.families.tokenizers.instructed import InstructedTokens
from jaxdiff.models import sana
from jaxdiff.models.codecs import autoencoder_dc
from jaxdiff.models.text import gemma2


def _assemble(configs: Mapping, networks: Mapping[str, Network], index: Mapping) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.channels),
            ("out_channels", transformer.out_channels, vae.channels),
            ("caption_channels", transformer.caption_channels, configs["text_encoder"].hidden_size),
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
            sample_size=transformer.sample_size,
            size_multiple=1,
            evaluate=evaluation(networks["transformer"]),
        ),
        codec=codec(networks["vae"], vae, vae.channels),
    )


def _encode_text(
    graph: nnx.GraphDef, params: Params, tokens: Mapping[str, InstructedTokens], clip_skip: int
) -> Text:
    ids, mask, kept = tokens["text_encoder"]
    (hidden,) = nnx.merge(graph, params["text_encoder"])(ids, mask, layers=(-1,))
    return Text(
        jnp.take_along_axis(hidden, kept[:, :, None], axis=1),
        mask=jnp.take_along_axis(mask, kept, axis=1),
    )


def _condition(text: Text, sizes: None) -> dict[str, Array]:
    return {"context": text.context, "mask": text.mask}


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
