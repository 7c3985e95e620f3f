"""FLUX.1 dev, schnell, Fill, Kontext and Control: a flow transformer with T5 and CLIP.

See Black Forest Labs' code and report, 2025, arXiv:2506.15742.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.controlnet import FLUX_CONTROLNET
from jaxdiff.checkpoint.lora_names import xlabs_names
from jaxdiff.checkpoint.original import flux as original
from jaxdiff.errors import InputError
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import AUTOENCODER_KL, CLIP_TEXT, T5
from jaxdiff.families.controlnets import refuse_misfit, refuse_other_class
from jaxdiff.families.family import EMBEDDED, UNGUIDED, Family
from jaxdiff.families.image_inputs import EDITS, ImageInputs
from jaxdiff.families.tokenizers.openers import by_encoder, clip_tokenizer, t5_tokenizer
from jaxdiff.families.transformer import Defaults, kl_decoder_operations, kohya_names

PIPELINE = "FluxPipeline"
FILL_PIPELINE = "FluxFillPipeline"  # for inpainting
KONTEXT_PIPELINE = "FluxKontextPipeline"  # for editing by instruction
CONTROL_PIPELINE = "FluxControlPipeline"  # Canny and Depth, which follow a control image
PATCH = 2  # latents along each side of a token
SAMPLE_SIZE = 128  # latents along each side of an image, in all published models
TOKENS = 512  # of T5
VARIANTS = {FILL_PIPELINE: "Fill", KONTEXT_PIPELINE: "Kontext", CONTROL_PIPELINE: "Control"}
DEV, SCHNELL, FILL = (28, 3.5), (4, 1.0), (50, 30.0)  # steps and guidance scale
ONCE_AN_IMAGE = ("time_text_embed.", ".norm1.linear.", ".norm1_context.linear.", ".norm.linear.")
OF_THE_TEXT = ("context_embedder.", ".add_", ".to_add_out.", ".ff_context.")
OF_BOTH = "single_transformer_blocks."
# The config keys in which a ControlNet must equal the transformer, because it adds to its tokens
# and is given what the transformer is given. It may have fewer blocks.
SHARED_WITH_CONTROLNETS = (
    *("in_channels", "attention_head_dim", "num_attention_heads", "axes_dims_rope"),
    *("joint_attention_dim", "pooled_projection_dim"),
)


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    is_dev = checkpoint.config("transformer").get("guidance_embeds", False) is True
    usual = FILL if checkpoint.pipeline == FILL_PIPELINE else DEV if is_dev else SCHNELL
    variant = VARIANTS.get(checkpoint.pipeline, "dev" if is_dev else "schnell")
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, *usual)
    factor = config_values.kl_factor(checkpoint)
    return Defaults(
        name=f"FLUX.1 {variant}",
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


def _operations(
    checkpoint: Checkpoint, height: int, width: int, tokens: int, *, references: int = 0
) -> tuple[int, int]:
    output = height * width // PATCH**2
    image = (1 + references) * output

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        if key.startswith("proj_out."):
            return output
        if key.startswith(OF_BOTH):
            return image + tokens
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    counted = transformer_operations.of_network(
        checkpoint.weights("transformer"), rows, lambda key: (image + tokens) ** 2
    )
    return counted, counted


def check_controlnet(checkpoint: Checkpoint, config: Mapping) -> None:
    """Raises InputError if a ControlNet is of a kind without support, or has other widths.

    The network itself is compared in full when it is built.
    """
    refuse_other_class(config, [FLUX_CONTROLNET.class_name])
    if config.get("conditioning_embedding_channels") is not None:
        raise InputError(
            "conditioning_embedding_channels: the ControlNet sees pixels (as XLabs' do), and only "
            "those that see latents are supported (such as InstantX's); use one of them"
        )
    refuse_misfit(checkpoint.config("transformer"), config, SHARED_WITH_CONTROLNETS)


def _networks(**purpose):
    from jaxdiff.families import flux_model

    return flux_model.networks(patch=PATCH, sample_size=SAMPLE_SIZE, **purpose)


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
    check_controlnet=check_controlnet,
    networks=partial(_networks, shared_with_controlnets=SHARED_WITH_CONTROLNETS),
)
FLUX_FILL = replace(
    FLUX,
    image_inputs=lambda checkpoint: ImageInputs(strength=1.0, masked_strength=1.0, needed=True),
    check_controlnet=None,
    networks=partial(_networks, inpaints=True),
)
FLUX_KONTEXT = replace(
    FLUX,
    image_inputs=lambda checkpoint: EDITS,
    operations=partial(_operations, references=1),
    check_controlnet=None,
    networks=partial(_networks, edits=True),
)
FLUX_CONTROL = replace(
    FLUX,
    image_inputs=lambda checkpoint: None,
    sees_control=True,
    check_controlnet=None,
    networks=partial(_networks, sees_control=True),
)
