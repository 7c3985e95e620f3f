"""Sana: a linear transformer with Gemma 2 as its text encoder and a deeply compressing codec.

See Xie et al., 2024, arXiv:2410.10629. As in diffusers' pipeline, prompts are stripped and
converted to lower case, and the text encoder gets an instruction before them. Unlike there, sizes
are not changed to the nearest of a table.
"""

from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.families import config_values, transformer_operations
from jaxdiff.families.components import GEMMA_2
from jaxdiff.families.family import Family
from jaxdiff.families.tokenizers.openers import instructed_tokenizer
from jaxdiff.families.transformer import Defaults

PIPELINE = "SanaPipeline"
TOKENS = 300
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
        "descriptions suitable for image generation. Evaluate the level of detail in the user "
        "prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
        "textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly "
        "without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
        "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
        "flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
        "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
        "double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including "
        "any additional commentary or evaluations:",
        "User Prompt: ",
    )
)
STEPS, GUIDANCE_SCALE = 20, 4.5  # the defaults of the pipeline's __call__ in diffusers
ONCE_AN_IMAGE = ("time_embed.", "scale_shift_table")
OF_THE_TEXT = ("caption_projection.", ".attn2.to_k.", ".attn2.to_v.")


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    integer = partial(config_values.integer, checkpoint)
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, STEPS, GUIDANCE_SCALE)
    factor = config_values.factor_of_blocks(checkpoint, "decoder_block_out_channels")
    side = integer("transformer", "sample_size", 32) * factor
    channels = integer("vae", "latent_channels", 32)
    scaling = checkpoint.config("vae").get("scaling_factor", 1.0)
    return Defaults(
        name="Sana",
        size=(side, side),
        size_multiple=factor,
        factor=factor,
        latent_channels=channels,
        latents={"size_multiple": factor, "channels": channels, "scaling_factor": scaling},
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        tokens=TOKENS,
        scheduler=checkpoint.config("scheduler"),
    )


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    image = height * width
    head = config_values.integer(checkpoint, "transformer", "attention_head_dim", 32)

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    def pairs(key: str) -> int:  # linear self-attention has none, but a matrix for each head
        return image * (tokens if ".attn2." in key else head)

    counted = transformer_operations.of_network(checkpoint.weights("transformer"), rows, pairs)
    return counted, counted


def _decoder_operations(checkpoint: Checkpoint, height: int, width: int) -> int:
    weights = checkpoint.weights("vae")
    return transformer_operations.of_decoder(weights, height, width, deepest_first=False)


def _networks():
    from jaxdiff.families import sana_model

    return sana_model.NETWORKS


SANA = Family(
    components={
        "text_encoder": GEMMA_2,
        "transformer": Component(library="diffusers", class_name="SanaTransformer2DModel"),
        "vae": Component(library="diffusers", class_name="AutoencoderDC"),
    },
    defaults=defaults,
    schedule=lambda config, bucket: noise_schedule(config, bucket.sampler),
    operations=_operations,
    decoder_operations=_decoder_operations,
    tokenizer=partial(instructed_tokenizer, TOKENS, INSTRUCTION),
    networks=_networks,
)
