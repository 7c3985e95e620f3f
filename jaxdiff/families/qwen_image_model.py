"""The networks of Qwen-Image as pure functions: the part that imports JAX."""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.families.model import Model, Reference, Text
from jaxdiff.families.networks import Architecture, Networks, fit, model
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.images.clip_pixels import MEAN, STD
from jaxdiff.models import qwen_image
from jaxdiff.models.codecs import autoencoder_kl_qwen_image
from jaxdiff.models.text import qwen, qwen_vl
from jaxdiff.weights.network import Network

SeenSize = Callable[[int, int], tuple[int, int]]


def _assemble(
    configs: Mapping,
    networks: Mapping[str, Network],
    *,
    hidden_tokens: int,
    patch: int,
    side_px: int,
    seen_size: SeenSize | None,
) -> Model:
    transformer, vae, edits = configs["transformer"], configs["vae"], seen_size is not None
    text = configs["text_encoder"].text if edits else configs["text_encoder"]
    fit(
        [
            ("in_channels", transformer.in_channels, patch**2 * vae.channels),
            ("out_channels", transformer.out_channels, vae.channels),
            ("joint_attention_dim", transformer.joint_attention_dim, text.hidden_size),
        ]
    )
    return model(
        configs,
        networks,
        partial(_encode_text_and_image if edits else _encode_text, hidden_tokens),
        channels=vae.channels,
        sample_size=side_px // vae.factor,
        size_multiple=patch,
        norm_patch=patch,
        reference=Reference(vae.channels, vae.scale) if edits else None,
        options={"image_size": seen_size},
    )


def _encode_text(
    hidden_tokens: int,
    encoders: Mapping[str, nnx.Module],
    tokens: Mapping[str, Tokens],
    clip_skip: int,
) -> Text:
    ids, mask = tokens["text_encoder"]
    (hidden,) = encoders["text_encoder"](ids, mask, layers=(-1,))
    return Text(hidden[:, hidden_tokens:], mask=mask[:, hidden_tokens:])


def _encode_text_and_image(
    hidden_tokens: int,
    encoders: Mapping[str, nnx.Module],
    tokens: Mapping[str, Tokens | Array],
    clip_skip: int,
) -> Text:
    ids, mask = tokens["text_encoder"]
    images = (tokens["image"].astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
    (hidden,), mask = encoders["text_encoder"].with_images(ids, mask, images, layers=(-1,))
    return Text(hidden[:, hidden_tokens:], mask=mask[:, hidden_tokens:])


TEXT = Architecture(qwen.Qwen2_5_VLConfig, lambda config: qwen.Qwen2_5_VLTextModel, qwen.SHARDING)
TEXT_AND_IMAGE = Architecture(
    qwen_vl.Qwen2_5_VLImageConfig, lambda config: qwen_vl.Qwen2_5_VLModel, qwen_vl.SHARDING
)


def networks(
    *, hidden_tokens: int, patch: int, side_px: int, seen_size: SeenSize | None = None
) -> Networks:
    """Returns the networks; the arguments are constants of the family's page.

    A model for editing has a `seen_size`, the `Model.image_size`.
    """
    return Networks(
        architectures={
            "text_encoder": TEXT if seen_size is None else TEXT_AND_IMAGE,
            "transformer": Architecture(
                qwen_image.QwenImageConfig,
                lambda config: qwen_image.QwenImageTransformer2DModel,
                qwen_image.SHARDING,
            ),
            "vae": Architecture(
                autoencoder_kl_qwen_image.AutoencoderKLQwenImageConfig,
                lambda config: autoencoder_kl_qwen_image.AutoencoderKLQwenImage,
                autoencoder_kl_qwen_image.SHARDING,
            ),
        },
        assemble=partial(
            _assemble,
            hidden_tokens=hidden_tokens,
            patch=patch,
            side_px=side_px,
            seen_size=seen_size,
        ),
    )
