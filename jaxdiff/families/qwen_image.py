"""Qwen-Image: a flow transformer with the language model of Qwen2.5-VL as its text encoder.

See arXiv:2508.02324. The guided prediction is brought to the norm of the conditional one.
"""

from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import QWEN_2_5_VL
from jaxdiff.families.family import Family
from jaxdiff.families.image_inputs import ImageInputs
from jaxdiff.families.tokenizers.openers import chat_tokenizer
from jaxdiff.families.transformer import Defaults

PIPELINE = "QwenImagePipeline"
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
        name="Qwen-Image",
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


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    image = height * width // PATCH**2

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
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


def _networks():
    from jaxdiff.families import qwen_image_model

    return qwen_image_model.networks(hidden_tokens=HIDDEN_TOKENS, patch=PATCH, side_px=SIDE_PX)


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
    networks=_networks,
)
