"""PixArt-Alpha and PixArt-Sigma: a diffusion transformer with a T5 text encoder.

See Chen et al., 2023, arXiv:2310.00426, and Chen et al., 2024, arXiv:2403.04692.

As diffusers' pipelines do without their optional packages, prompts are stripped and converted to
lower case. Unlike them, sizes are not changed to the nearest of a table.
"""

from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.families import config_values, transformer_operations
from jaxdiff.families.components import AUTOENCODER_KL, T5
from jaxdiff.families.family import Family
from jaxdiff.families.tokenizers.openers import t5_tokenizer
from jaxdiff.families.transformer import Defaults, kl_decoder_operations

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
NAMES = {ALPHA: "PixArt-Alpha", SIGMA: "PixArt-Sigma"}
TOKENS = {ALPHA: 120, SIGMA: 300}
STEPS, GUIDANCE_SCALE = 20, 4.5  # the defaults of the pipelines' __call__ in diffusers
ONCE_AN_IMAGE = ("adaln_single.", "scale_shift_table")
OF_THE_TEXT = ("caption_projection.", ".attn2.to_k.", ".attn2.to_v.")


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    integer = partial(config_values.integer, checkpoint)
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, STEPS, GUIDANCE_SCALE)
    factor = config_values.kl_factor(checkpoint)
    side = integer("transformer", "sample_size", 128) * factor
    return Defaults(
        name=NAMES[checkpoint.pipeline],
        size=(side, side),
        size_multiple=factor * integer("transformer", "patch_size", 2),
        factor=factor,
        latent_channels=integer("vae", "latent_channels", 4),
        latents=config_values.kl_latents(checkpoint),
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        tokens=TOKENS[checkpoint.pipeline],
        scheduler=checkpoint.config("scheduler"),
    )


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    patch = config_values.integer(checkpoint, "transformer", "patch_size", 2)
    image = height * width // patch**2

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    def pairs(key: str) -> int:
        return image * (tokens if ".attn2." in key else image)

    counted = transformer_operations.of_network(checkpoint.weights("transformer"), rows, pairs)
    return counted, counted


def _networks():
    from jaxdiff.families import pixart_model

    return pixart_model.NETWORKS


PIXART = {
    pipeline: Family(
        components={
            "text_encoder": T5,
            "transformer": Component(
                library="diffusers",
                class_name="PixArtTransformer2DModel",
                other_class_names=("Transformer2DModel",),
            ),
            "vae": AUTOENCODER_KL,
        },
        defaults=defaults,
        schedule=lambda config, bucket: noise_schedule(config, bucket.sampler),
        operations=_operations,
        decoder_operations=kl_decoder_operations,
        tokenizer=partial(t5_tokenizer, TOKENS[pipeline], lambda text: text.lower().strip()),
        networks=_networks,
    )
    for pipeline in NAMES
}
