"""Stable Diffusion 3 and 3.5: a flow transformer with two CLIP text encoders and, optionally, T5.

See Esser et al., 2024, arXiv:2403.03206.
"""

from dataclasses import replace
from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.original import sd3 as original
from jaxdiff.checks import MAX_SIDE_PX
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import AUTOENCODER_KL, CLIP_TEXT_PROJECTED, T5
from jaxdiff.families.family import Family
from jaxdiff.families.image_inputs import ImageInputs
from jaxdiff.families.tokenizers.openers import (
    CLIP_TOKENS,
    by_encoder,
    clip_tokenizer,
    t5_tokenizer,
)
from jaxdiff.families.transformer import Defaults, kl_decoder_operations, kohya_names
from jaxdiff.request import Bucket

PIPELINE = "StableDiffusion3Pipeline"
T5_TOKENS = 256  # which are zeros without T5
STEPS, GUIDANCE_SCALE = 28, 7.0  # the defaults of the pipeline's __call__ in diffusers
ONCE_AN_IMAGE = ("time_text_embed.", ".norm1.linear.", ".norm1_context.linear.", "norm_out.")
OF_THE_TEXT = ("context_embedder.", ".add_", ".to_add_out.", ".ff_context.")
BUFFER = "pos_embed.pos_embed"


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    integer = partial(config_values.integer, checkpoint)
    config = checkpoint.config("transformer")
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, STEPS, GUIDANCE_SCALE)
    factor = config_values.kl_factor(checkpoint)
    side = integer("transformer", "sample_size", 128) * factor
    patch_px = factor * integer("transformer", "patch_size", 2)
    of_t5 = T5_TOKENS if "text_encoder_3" in checkpoint.networks else 1  # one zero for all
    return Defaults(
        name=f"Stable Diffusion {'3.5' if config.get('qk_norm') else '3'}",
        size=(side, side),
        size_multiple=patch_px,
        largest_side=min(patch_px * integer("transformer", "pos_embed_max_size", 96), MAX_SIDE_PX),
        factor=factor,
        latent_channels=integer("vae", "latent_channels", 4),
        latents=config_values.kl_latents(checkpoint),
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        tokens=integer("text_encoder", "max_position_embeddings", CLIP_TOKENS) + of_t5,
        scheduler=checkpoint.config("scheduler"),
    )


def _schedule(config: dict, bucket: Bucket):
    """Returns the schedule, whose shift diffusers applies twice: see `levels`."""
    return noise_schedule(config, bucket.sampler).shifted_for(flow.tokens(bucket))


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    image = height * width // config_values.integer(checkpoint, "transformer", "patch_size", 2) ** 2

    def rows(key: str) -> int:
        if key == BUFFER:
            return 0
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    def pairs(key: str) -> int:
        return image**2 if ".attn2." in key else (image + tokens) ** 2

    counted = transformer_operations.of_network(checkpoint.weights("transformer"), rows, pairs)
    return counted, counted


def _networks():
    from jaxdiff.families import stable_diffusion_3_model

    return stable_diffusion_3_model.networks(t5_tokens=T5_TOKENS)


STABLE_DIFFUSION_3 = Family(
    components={
        "text_encoder": CLIP_TEXT_PROJECTED,
        "text_encoder_2": replace(CLIP_TEXT_PROJECTED, tokenizer="tokenizer_2"),
        "text_encoder_3": replace(T5, tokenizer="tokenizer_3", optional=True),
        "transformer": Component(library="diffusers", class_name="SD3Transformer2DModel"),
        "vae": AUTOENCODER_KL,
    },
    absent={"image_encoder": [None, None], "feature_extractor": [None, None]},
    own_options=frozenset({"clip_skip", "skip_layers"}),
    defaults=defaults,
    schedule=_schedule,
    operations=_operations,
    decoder_operations=kl_decoder_operations,
    tokenizer=by_encoder(
        {
            "text_encoder": clip_tokenizer,
            "text_encoder_2": clip_tokenizer,
            "text_encoder_3": partial(t5_tokenizer, T5_TOKENS, str),
        }
    ),
    kohya_names=partial(kohya_names, (original.names,)),
    image_inputs=lambda checkpoint: ImageInputs(strength=0.6, masked_strength=0.6),
    networks=_networks,
)
