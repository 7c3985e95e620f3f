"""The networks of Qwen-Image as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

from flax import nnx

from jaxdiff.families.model import Model, Network, Text
from jaxdiff.families.networks import Architecture, Networks, fit, model
from jaxdiff.families.tokenizers.tokenizer import Tokens
from jaxdiff.models import qwen_image
from jaxdiff.models.codecs import autoencoder_kl_qwen_image
from jaxdiff.models.text import qwen


def _assemble(
    configs: Mapping,
    networks: Mapping[str, Network],
    *,
    hidden_tokens: int,
    patch: int,
    side_px: int,
) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    width = configs["text_encoder"].hidden_size
    fit(
        [
            ("in_channels", transformer.in_channels, patch**2 * vae.channels),
            ("out_channels", transformer.out_channels, vae.channels),
            ("joint_attention_dim", transformer.joint_attention_dim, width),
        ]
    )
    return model(
        configs,
        networks,
        partial(_encode_text, hidden_tokens),
        channels=vae.channels,
        sample_size=side_px // vae.factor,
        size_multiple=patch,
        norm_patch=patch,
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


def networks(*, hidden_tokens: int, patch: int, side_px: int) -> Networks:
    """Returns the networks; the arguments are constants of the family's page."""
    return Networks(
        architectures={
            "text_encoder": Architecture(
                qwen.Qwen2_5_VLConfig, lambda config: qwen.Qwen2_5_VLTextModel, qwen.SHARDING
            ),
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
        assemble=partial(_assemble, hidden_tokens=hidden_tokens, patch=patch, side_px=side_px),
    )
