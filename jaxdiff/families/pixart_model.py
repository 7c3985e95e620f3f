"""The networks of PixArt as pure functions: the part that imports JAX."""

from collections.abc import Mapping

from flax import nnx

from jaxdiff.families.model import Model, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    T5,
    Architecture,
    Networks,
    fit,
    model,
)
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.models import pixart
from jaxdiff.weights.network import Network


def _assemble(configs: Mapping, networks: Mapping[str, Network]) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    fit(
        [
            ("in_channels", transformer.in_channels, vae.latent_channels),
            ("caption_channels", transformer.caption_channels, configs["text_encoder"].d_model),
        ]
    )
    return model(
        configs,
        networks,
        _encode_text,
        channels=vae.latent_channels,
        options={"sizes": _sizes} if transformer.takes_sizes else {},
        sample_size=transformer.sample_size,
        size_multiple=transformer.patch_size,
    )


def _encode_text(
    encoders: Mapping[str, nnx.Module], tokens: Mapping[str, Tokens], clip_skip: int
) -> Text:
    ids, mask = tokens["text_encoder"]
    hidden = encoders["text_encoder"](ids, mask)
    return Text(hidden, mask=mask)


def _sizes(height: int, width: int, negative: bool) -> tuple[float, ...]:
    """Returns an image's size and aspect ratio (arXiv:2310.00426, appendix A.2)."""
    return height, width, height / width


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
