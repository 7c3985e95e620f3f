"""The networks of PixArt as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx
from jax import Array

from jaxdiff.families.model import Denoiser, Model, Network, Params, Text
from jaxdiff.families.networks import AUTOENCODER_KL, Architecture, Networks, codec, fit
from jaxdiff.families.tokens import Tokens
from jaxdiff.models import pixart
from jaxdiff.models.text import t5


def assemble(configs: Mapping, networks: Mapping[str, Network], index: Mapping) -> Model:
    """Assembles the model; see `networks.Networks`."""
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
        skippable={},
        encode_text=partial(_encode_text, networks["text_encoder"].graph),
        zeros_for_empty=False,
        sizes=_sizes if transformer.takes_sizes else None,
        condition=_condition,
        denoiser=Denoiser(
            component="transformer",
            guidance_is_input=False,
            sample_size=transformer.sample_size,
            size_multiple=transformer.patch_size,
            evaluate=partial(_evaluate, networks["transformer"].graph),
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


def _evaluate(
    graph: nnx.GraphDef,
    params: Params,
    latents: Array,
    timesteps: Array,
    conditioning: Mapping[str, Array | None],
    guidance_scale: Array | None = None,
    kept: Any = None,
) -> tuple[Array, None]:
    return nnx.merge(graph, params)(latents, timesteps, **conditioning), None


NETWORKS = Networks(
    architectures={
        "text_encoder": Architecture(t5.T5Config, lambda config: t5.T5EncoderModel, t5.SHARDING),
        "transformer": Architecture(
            pixart.PixArtConfig, lambda config: pixart.PixArtTransformer2DModel, pixart.SHARDING
        ),
        "vae": AUTOENCODER_KL,
    },
    assemble=assemble,
)
