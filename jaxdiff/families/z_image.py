"""Z-Image and Z-Image-Turbo: a single-stream flow transformer with Qwen3 as its text encoder.

See arXiv:2511.22699. The guidance scale here is one more than in diffusers' pipeline, which adds
scale * (conditional - unconditional) to the conditional prediction. Turbo needs none, and its files
do not differ from those of Z-Image: use `--steps 9 --guidance-scale 1`.
"""

from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.original import z_image as original
from jaxdiff.checks import MAX_SIDE_PX, shown
from jaxdiff.errors import InputError
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import AUTOENCODER_KL, QWEN3
from jaxdiff.families.family import Family
from jaxdiff.families.image_inputs import ImageInputs
from jaxdiff.families.tokenizers.openers import chat_tokenizer
from jaxdiff.families.transformer import Defaults, kl_decoder_operations, kohya_names

PIPELINE = "ZImagePipeline"
PATCH = 2  # latents along each side of a token
SIDE_PX = 1024  # the pipeline's default
TOKENS = 512
# What Qwen3's chat template makes of one message, with thinking allowed.
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
STEPS, GUIDANCE_SCALE = 50, 6.0  # the defaults of the pipeline's __call__ in diffusers
ONCE_AN_IMAGE = ("t_embedder.", ".adaLN_modulation.")
OF_THE_TEXT = ("cap_embedder.", "context_refiner.")
OF_THE_IMAGE = ("all_x_embedder.", "all_final_layer.", "noise_refiner.")


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, STEPS, GUIDANCE_SCALE)
    factor = config_values.kl_factor(checkpoint)
    return Defaults(
        name="Z-Image",
        size=(SIDE_PX, SIDE_PX),
        size_multiple=PATCH * factor,
        largest_side=min(PATCH * factor * _positions(checkpoint), MAX_SIDE_PX),
        factor=factor,
        latent_channels=config_values.integer(checkpoint, "vae", "latent_channels", 4),
        latents=config_values.kl_latents(checkpoint),
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        tokens=TOKENS,
        scheduler=checkpoint.config("scheduler"),
    )


def _positions(checkpoint: Checkpoint) -> int:
    """Returns the number of tokens that fit along the shorter of the two spatial axes."""
    lengths = checkpoint.config("transformer").get("axes_lens", [1024, 512, 512])
    is_list = isinstance(lengths, list | tuple)
    if not is_list or [type(n) for n in lengths] != [int] * 3 or min(lengths) < 1:
        raise InputError(
            f"{checkpoint.place('transformer')}: axes_lens = {shown(lengths)} must be three "
            "positive whole numbers"
        )
    return min(lengths[1:])


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    image = height * width // PATCH**2

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        if key.startswith(OF_THE_TEXT):
            return tokens
        return image if key.startswith(OF_THE_IMAGE) else image + tokens

    counted = transformer_operations.of_network(
        checkpoint.weights("transformer"), rows, lambda key: rows(key) ** 2
    )
    return counted, counted


def _networks():
    from jaxdiff.families import z_image_model

    return z_image_model.networks(patch=PATCH, side_px=SIDE_PX)


Z_IMAGE = Family(
    components={
        "text_encoder": QWEN3,
        "transformer": Component(library="diffusers", class_name="ZImageTransformer2DModel"),
        "vae": AUTOENCODER_KL,
    },
    defaults=defaults,
    schedule=flow.uniform,
    operations=_operations,
    decoder_operations=kl_decoder_operations,
    tokenizer=partial(chat_tokenizer, TOKENS, BEFORE, AFTER),
    kohya_names=partial(kohya_names, (original.names,)),
    image_inputs=lambda checkpoint: ImageInputs(strength=0.6, masked_strength=1.0),
    networks=_networks,
)
