"""The networks of PixArt as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

from flax import nnx
from jax import Array

from jaxdiff.families.model import Denoiser, Model, Network, Params, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    T5,
    Architecture,
    Networks,
    codec,
    evaluation,
    fit,
)
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.models import pixart


def _assemble(configs: Mapping, networks: Mapping[str, Network], index: Mapping) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.latent_channels),
            ("caption_channels", transformer.caption_channels, configs["text_encoder"].d_model),
        ]
    )
    return Model(
        configs=configs,
        networks=networks,
        text_encoders=("text_encoder",),
        encode_text=partial(_encode_text, networks["text_encoder"].graph),
        sizes=_sizes if transformer.takes_sizes else None,
        condition=_condition,
        denoiser=Denoiser(
            component="transformer",
            sample_size=transformer.sample_size,
            size_multiple=transformer.patch_size,
            evaluate=evaluation(networks["transformer"]),
        ),
        codec=codec(networks["vae"], vae, vae.latent_channels),
    )


def _encode_text(
    graph: nnx.GraphDef, params: Params, tokens: Mapping[str, Tokens], clip_skip: int
) -> Text:
    ids, mask = tokens["text_encoder"]
    hidden = nnx.merge(graph, params["text_encoder"])(ids, mask)
    return Text(hidden, mask=mask)


def _sizes(height: int, width: int, negative: bool) -> tuple[float, ...]:
    """Returns an image's size and aspect ratio (arXiv:2310.00426, appendix A.2)."""
    return height, width, height / width


def _condition(text: Text, sizes: Array | None) -> dict[str, Array | None]:
    return {"context": text.context, "mask": text.mask, "sizes": sizes}


NETWORKS = Networks(
    architectures={
        "text_encoder": T5,
        "transformer": Architecture(
            pixart.PixArtConfig, lambda config: pixart.PixArtTransformer2DModel, pixart.SHARDING
        ),
        "vae": AUTOENCODER_KL,
    },
    assemble=_assemble,
)
