"""FLUX.2 klein: a flow transformer with Qwen3 as its text encoder.

See Black Forest Labs' code. Its latents are patches of 2x2, normalised for each channel.
"""

from functools import partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.original import flux2 as original
from jaxdiff.families import config_values, flow, transformer_operations
from jaxdiff.families.components import QWEN3
from jaxdiff.families.family import CLASSIFIER_FREE, UNGUIDED, Family
from jaxdiff.families.tokenizers.openers import chat_tokenizer
from jaxdiff.families.transformer import Defaults, kl_decoder_operations, kohya_names

PIPELINE = "Flux2KleinPipeline"
PATCH = 2  # of the autoencoder's latents, along each side of the denoiser's
SIDE_PX = 1024  # the pipeline's default
TOKENS = 512
# What Qwen3's chat template makes of one message, without thinking.
BEFORE = "<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
BASE, DISTILLED = (50, 4.0), (4, 1.0)  # steps and guidance scale
ONCE_AN_IMAGE = ("time_guidance_embed.", "_modulation", "norm_out.")
OF_THE_TEXT = ("context_embedder.", ".add_", ".to_add_out.", ".ff_context.")
OF_BOTH = "single_transformer_blocks."
FUSED = ".attn.to_qkv_mlp_proj.weight"


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Returns a checkpoint's properties and default settings.

    Raises:
      InputError: if a config gives no usable value.
    """
    is_distilled = checkpoint.index.get("is_distilled") is True
    steps, guidance_scale = config_values.steps_and_guidance(
        checkpoint, *(DISTILLED if is_distilled else BASE)
    )
    factor = PATCH * config_values.kl_factor(checkpoint)
    channels = PATCH**2 * config_values.integer(checkpoint, "vae", "latent_channels", 32)
    return Defaults(
        name="FLUX.2 klein" + " base" * (not is_distilled),
        size=(SIDE_PX, SIDE_PX),
        size_multiple=factor,
        factor=factor,
        latent_channels=channels,
        latents={"size_multiple": factor, "channels": channels, "class": "AutoencoderKLFlux2"},
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=config_values.sampler(checkpoint),
        guidance=UNGUIDED if is_distilled else CLASSIFIER_FREE,
        tokens=TOKENS,
        scheduler=checkpoint.config("scheduler"),
    )


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    image, weights = height * width, checkpoint.weights("transformer")
    inner = config_values.integer(checkpoint, "transformer", "num_attention_heads", 48)
    inner *= config_values.integer(checkpoint, "transformer", "attention_head_dim", 128)

    def rows(key: str) -> int:
        if any(part in key for part in ONCE_AN_IMAGE):
            return 1
        if key.startswith(OF_BOTH):
            return image + tokens
        return tokens if any(part in key for part in OF_THE_TEXT) else image

    pairs = (image + tokens) ** 2
    counted = transformer_operations.of_network(weights, rows, lambda key: pairs)
    counted += sum(4 * pairs * inner for key in weights if key.endswith(FUSED))
    return counted, counted


def _decoder_operations(checkpoint: Checkpoint, height: int, width: int) -> int:
    return kl_decoder_operations(checkpoint, PATCH * height, PATCH * width)


def _without_counter(key: str) -> str | None:
    return None if key == "bn.num_batches_tracked" else key


def _networks():
    from jaxdiff.families import flux2_model

    return flux2_model.networks(side_px=SIDE_PX)


FLUX_2 = Family(
    components={
        "text_encoder": QWEN3,
        "transformer": Component(library="diffusers", class_name="Flux2Transformer2DModel"),
        "vae": Component(
            library="diffusers", class_name="AutoencoderKLFlux2", plain_key=_without_counter
        ),
    },
    defaults=defaults,
    schedule=flow.empirical,
    operations=_operations,
    decoder_operations=_decoder_operations,
    tokenizer=partial(chat_tokenizer, TOKENS, BEFORE, AFTER),
    kohya_names=partial(kohya_names, (original.names,)),
    networks=_networks,
)
