"""FLUX.1 dev, schnell and Fill: a flow transformer with T5 and CLIP text encoders.

See Black Forest Labs' code and report, 2025, arXiv:2506.15742.
"""

from dataclasses import replace
from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.lora_names import xlabs_names
from jaxdiff.checkpoint.original import flux as original
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import AUTOENCODER_KL, CLIP_TEXT, T5
from jaxdiff.families.family import EMBEDDED, UNGUIDED, Family
from jaxdiff.families.image_inputs import ImageInputs
from jaxdiff.families.tokenizers.openers import by_encoder, clip_tokenizer, t5_tokenizer
from jaxdiff.families.transformer import Defaults, kl_decoder_operations, kohya_names

PIPELINE = "FluxPipeline"
FILL_PIPELINE = "FluxFillPipeline"  # for inpainting
PATCH = 2  # latents along each side of a token
SAMPLE_SIZE = 128  # latents along each side of an image, in all published models
TOKENS = 512  # of T5
DEV, SCHNELL, FILL = (28, 3.5), (4, 1.0), (50, 30.0)  # steps and guidance scale
ONCE_AN_IMAGE = ("time_text_embed.", ".norm1.linear.", ".norm1_context.linear.", ".norm.linear.")
OF_THE_TEXT = ("context_embedder.", ".add_", ".to_add_out.", ".ff_context.")
OF_BOTH = "single_transformer_blocks."


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    is_dev = checkpoint.config("transformer").get("guidance_embeds", False) is True
    fills = checkpoint.pipeline == FILL_PIPELINE
    usual = FILL if fills else DEV if is_dev else SCHNELL
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, *usual)
    factor = config_values.kl_factor(checkpoint)
    return Defaults(
        name=f"FLUX.1 {'Fill' if fills else 'dev' if is_dev else 'schnell'}",
        size=(SAMPLE_SIZE * factor,) * 2,
        size_multiple=PATCH * factor,
        factor=factor,
        latent_channels=config_values.integer(checkpoint, "vae", "latent_channels", 4),
        latents=config_values.kl_latents(checkpoint),
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        guidance=EMBEDDED if is_dev else UNGUIDED,
        tokens=TOKENS,
        scheduler=checkpoint.config("scheduler"),
    )


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    image = height * width // PATCH**2

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        if key.startswith(OF_BOTH):
            return image + tokens
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    counted = transformer_operations.of_network(
        checkpoint.weights("transformer"), rows, lambda key: (image + tokens) ** 2
    )
    return counted, counted


def _networks(*, inpaints: bool):
    from jaxdiff.families import flux_model

    return flux_model.networks(patch=PATCH, sample_size=SAMPLE_SIZE, inpaints=inpaints)


FLUX = Family(
    components={
        "text_encoder": CLIP_TEXT,
        "text_encoder_2": replace(T5, tokenizer="tokenizer_2"),
        "transformer": Component(library="diffusers", class_name="FluxTransformer2DModel"),
        "vae": AUTOENCODER_KL,
    },
    absent={"image_encoder": [None, None], "feature_extractor": [None, None]},
    defaults=defaults,
    schedule=flow.uniform,
    operations=_operations,
    decoder_operations=kl_decoder_operations,
    tokenizer=by_encoder(
        {"text_encoder": clip_tokenizer, "text_encoder_2": partial(t5_tokenizer, TOKENS, str)}
    ),
    kohya_names=partial(kohya_names, (original.names, xlabs_names)),
    image_inputs=lambda checkpoint: ImageInputs(strength=0.6, masked_strength=0.6),
    networks=partial(_networks, inpaints=False),
)
FLUX_FILL = replace(
    FLUX,
    image_inputs=lambda checkpoint: ImageInputs(strength=1.0, masked_strength=1.0, needed=True),
    networks=partial(_networks, inpaints=True),
)
