"""The networks of Stable Diffusion 3 as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from flax import nnx

from jaxdiff.families.model import Model, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    CLIP_TEXT,
    T5,
    Architecture,
    Networks,
    fit,
    model,
)
from jaxdiff.models import sd3
from jaxdiff.weights.network import Network

CLIPS, OPTIONAL_T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
LAYERS_SKIPPED = 1  # the penultimate layer's hidden states (arXiv:2403.03206, appendix B.3)


def _assemble(configs: Mapping, networks: Mapping[str, Network], *, t5_tokens: int) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    if vae.shift_factor is None:  # then there is none, but diffusers' pipeline needs a number
        vae = replace(vae, shift_factor=0.0)
        configs = {**configs, "vae": vae}
    clips = [configs[name] for name in CLIPS]
    pooled = sum(clip.projection_dim for clip in clips)
    joint, of_clip = transformer.joint_attention_dim, sum(clip.hidden_size for clip in clips)
    needed = [
        ("in_channels", transformer.in_channels, vae.latent_channels),
        ("out_channels", transformer.out_channels or transformer.in_channels, vae.latent_channels),
        ("pooled_projection_dim", transformer.pooled_projection_dim, pooled),
        ("joint_attention_dim", joint, max(joint, of_clip)),
    ]
    encoders = CLIPS
    if OPTIONAL_T5 in configs:
        encoders += (OPTIONAL_T5,)
        needed.append(("joint_attention_dim", joint, configs[OPTIONAL_T5].d_model))
    fit(needed)
    return model(
        configs,
        networks,
        partial(_encode_text, joint),
        text_encoders=encoders,
        channels=vae.latent_channels,
        fixed={} if OPTIONAL_T5 in configs else {"last_counts": t5_tokens},
        options={
            "skippable": {name: configs[name].num_hidden_layers - LAYERS_SKIPPED for name in CLIPS}
        },
        sample_size=transformer.sample_size,
        size_multiple=transformer.patch_size,
    )


def _encode_text(
    width: int,
    encoders: Mapping[str, nnx.Module],
    tokens: Mapping,
    clip_skip: int,
) -> Text:
    """Encodes prompts: CLIP's tokens, filled up to T5's `width` with zeros, then T5's.

    T5's padding is seen like all other tokens. Without T5, its tokens are zeros, of which one
    stands for all; see `last_counts` of the network.
    """
    contexts, vectors = [], []
    for name in CLIPS:
        hidden, vector = encoders[name](
            tokens[name][:, 0], layers_skipped=LAYERS_SKIPPED + clip_skip, final_norm=False
        )
        contexts.append(hidden)
        vectors.append(vector)
    of_clip = jnp.concatenate(contexts, axis=-1)
    of_clip = jnp.pad(of_clip, ((0, 0), (0, 0), (0, width - of_clip.shape[-1])))
    if OPTIONAL_T5 in encoders:
        of_t5 = encoders[OPTIONAL_T5](tokens[OPTIONAL_T5].ids)
    else:
        of_t5 = jnp.zeros((len(of_clip), 1, width), of_clip.dtype)
    context = jnp.concatenate([of_clip, of_t5.astype(of_clip.dtype)], axis=1)
    return Text(context, jnp.concatenate(vectors, axis=-1))


def networks(*, t5_tokens: int) -> Networks:
    """Returns the networks; the arguments are constants of the family's page."""
    return Networks(
        architectures={
            **dict.fromkeys(CLIPS, CLIP_TEXT),
            OPTIONAL_T5: T5,
            "transformer": Architecture(
                sd3.SD3Config, lambda config: sd3.SD3Transformer2DModel, sd3.SHARDING
            ),
            "vae": AUTOENCODER_KL,
        },
        assemble=partial(_assemble, t5_tokens=t5_tokens),
    )
