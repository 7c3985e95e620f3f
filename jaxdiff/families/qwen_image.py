"""Qwen-Image and Qwen-Image-Edit: a flow transformer with Qwen2.5-VL as its text encoder.

See arXiv:2508.02324. The guided prediction is brought to the norm of the conditional one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import QWEN_2_5_VL, QWEN_2_5_VL_WITH_VISION
from jaxdiff.families.family import Family
from jaxdiff.families.image_inputs import EDITS, ImageInputs
from jaxdiff.families.tokenizers.openers import chat_about_image_tokenizer, chat_tokenizer
from jaxdiff.families.transformer import Defaults

PIPELINE = "QwenImagePipeline"
EDIT_PIPELINE = "QwenImageEditPipeline"  # for editing by instruction
PATCH = 2  # latents along each side of a token
SIDE_PX = 1024  # the pipeline's default
TOKENS = 512  # that the denoiser gets
HIDDEN_TOKENS = 34  # of the system's message, which it does not get
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
EDIT_HIDDEN_TOKENS = 64
EDIT_BEFORE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
)
# What the published processor of images does to their sizes.
SEEN_FACTOR = 28  # pixels along each side of one of the text encoder's tokens
LEAST_SEEN_PX, MOST_SEEN_PX = 56**2, 3584**2
STEPS, GUIDANCE_SCALE = 50, 4.0  # the defaults of the pipeline's __call__ in diffusers
ONCE_AN_IMAGE = ("time_text_embed.", ".img_mod.", ".txt_mod.", "norm_out.")
OF_THE_TEXT = ("txt_in.", ".add_", ".to_add_out.", ".txt_mlp.")


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    steps, guidance_scale = config_values.steps_and_guidance(checkpoint, STEPS, GUIDANCE_SCALE)
    factor = config_values.factor_of_blocks(checkpoint, "dim_mult")
    channels = config_values.integer(checkpoint, "vae", "z_dim", 16)
    config = checkpoint.config("vae")
    scales = {key: config.get(key) for key in ("latents_mean", "latents_std")}
    return Defaults(
        name="Qwen-Image-Edit" if checkpoint.pipeline == EDIT_PIPELINE else "Qwen-Image",
        size=(SIDE_PX, SIDE_PX),
        size_multiple=PATCH * factor,
        factor=factor,
        latent_channels=channels,
        latents={"size_multiple": factor, "channels": channels, **scales},
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        tokens=TOKENS,
        scheduler=checkpoint.config("scheduler"),
    )


def seen_size(height: int, width: int) -> tuple[int, int]:
    """Returns the size in which the text encoder sees an image of this height and width, in pixels.

    Each side is rounded to a multiple of `SEEN_FACTOR`; images with too few or too many pixels are
    scaled first.
    """

    def whole(to_whole: Callable[[float], int], *sides: float) -> tuple[int, int]:
        return tuple(SEEN_FACTOR * to_whole(side / SEEN_FACTOR) for side in sides)

    seen = whole(round, height, width)
    if math.prod(seen) > MOST_SEEN_PX:
        shrink = math.sqrt(height * width / MOST_SEEN_PX)
        seen = whole(math.floor, height / shrink, width / shrink)
        return tuple(max(SEEN_FACTOR, side) for side in seen)
    if math.prod(seen) < LEAST_SEEN_PX:
        grow = math.sqrt(LEAST_SEEN_PX / (height * width))
        return whole(math.ceil, height * grow, width * grow)
    return seen


def _operations(
    checkpoint: Checkpoint, height: int, width: int, tokens: int, *, edits: bool = False
) -> tuple[int, int]:
    output = image = height * width // PATCH**2
    if edits:  # both the transformer and the text encoder see the image
        factor = checkpoint.defaults.factor
        tokens += math.prod(seen_size(height * factor, width * factor)) // SEEN_FACTOR**2 - 1
        image = 2 * output

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        if key.startswith("proj_out."):
            return output
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    counted = transformer_operations.of_network(
        checkpoint.weights("transformer"), rows, lambda key: (image + tokens) ** 2
    )
    return counted, counted


def _decoder_operations(checkpoint: Checkpoint, height: int, width: int) -> int:
    weights = checkpoint.weights("vae")
    return transformer_operations.of_decoder(weights, height, width, deepest_first=True)


def _without_time(key: str) -> str | None:
    """Returns None for the layers that resample in time, which one frame skips."""
    return None if ".time_conv." in key else key


def _of_one_frame(tensor: StoredTensor) -> StoredTensor:
    """Returns the part of a kernel that sees a first frame: before it are zeros."""
    return tensor.last_tap() if len(tensor.shape) == 5 else tensor


def _networks(**purpose):
    from jaxdiff.families import qwen_image_model

    return qwen_image_model.networks(patch=PATCH, side_px=SIDE_PX, **purpose)


QWEN_IMAGE = Family(
    components={
        "text_encoder": QWEN_2_5_VL,
        "transformer": Component(library="diffusers", class_name="QwenImageTransformer2DModel"),
        "vae": Component(
            library="diffusers",
            class_name="AutoencoderKLQwenImage",
            plain_key=_without_time,
            plain_tensor=_of_one_frame,
        ),
    },
    defaults=defaults,
    schedule=flow.uniform,
    operations=_operations,
    decoder_operations=_decoder_operations,
    tokenizer=partial(chat_tokenizer, HIDDEN_TOKENS + TOKENS, BEFORE, AFTER),
    image_inputs=lambda checkpoint: ImageInputs(strength=0.6, masked_strength=0.6),
    networks=partial(_networks, hidden_tokens=HIDDEN_TOKENS),
)
QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    components=QWEN_IMAGE.components | {"text_encoder": QWEN_2_5_VL_WITH_VISION},
    operations=partial(_operations, edits=True),
    tokenizer=partial(chat_about_image_tokenizer, EDIT_HIDDEN_TOKENS + TOKENS, EDIT_BEFORE, AFTER),
    image_inputs=lambda checkpoint: EDITS,
    networks=partial(_networks, hidden_tokens=EDIT_HIDDEN_TOKENS, seen_size=seen_size),
)
