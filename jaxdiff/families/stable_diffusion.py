"""Stable Diffusion 1, 2 and XL with its refiner, Turbo and LCM: a U-Net with CLIP text encoders.

See Rombach et al., 2022, arXiv:2112.10752, and Podell et al., 2023, arXiv:2307.01952. Stable
Diffusion 1 trained to edit images is InstructPix2Pix (Brooks et al., 2023, arXiv:2211.09800).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.controlnet import CONTROLNET, CONTROLNET_UNION
from jaxdiff.checkpoint.lora_keys import original_layers
from jaxdiff.checkpoint.lora_names import Layer
from jaxdiff.checkpoint.original import ldm
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.families import unet_operations
from jaxdiff.families.components import AUTOENCODER_KL, CLIP_TEXT, CLIP_TEXT_PROJECTED
from jaxdiff.families.config_values import (
    integer,
    kl_factor,
    kl_latents,
    sampler,
    steps_and_guidance,
)
from jaxdiff.families.controlnets import refuse_misfit, refuse_other_class
from jaxdiff.families.family import CLASSIFIER_FREE, EMBEDDED, OWN_OPTIONS, Family
from jaxdiff.families.image_inputs import EDITS, ImageInputs
from jaxdiff.families.tokenizers.openers import clip_tokenizer

PIPELINE = "StableDiffusionPipeline"
LCM_PIPELINE = "LatentConsistencyModelPipeline"
INPAINT_PIPELINE = "StableDiffusionInpaintPipeline"
INSTRUCT_PIPELINE = "StableDiffusionInstructPix2PixPipeline"
XL_INPAINT_PIPELINE = "StableDiffusionXLInpaintPipeline"
XL_PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    XL_INPAINT_PIPELINE,
)
STEPS_AND_GUIDANCE = {  # the defaults of each pipeline's __call__ in diffusers
    PIPELINE: (50, 7.5),
    LCM_PIPELINE: (4, 8.5),
    INPAINT_PIPELINE: (50, 7.5),
    INSTRUCT_PIPELINE: (100, 7.5),
    **dict.fromkeys(XL_PIPELINES, (50, 5.0)),
    XL_INPAINT_PIPELINE: (50, 7.5),
}
OTHER_NOISE_LEVELS = ("EDM", "FlowMatch")  # prefixes of schedulers with other noise levels
CLIP_SAMPLE_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
BEFORE_0_9 = re.compile(r"0\.[0-8](\.|$)")  # a version of diffusers
TEXT_ENCODER_2 = replace(CLIP_TEXT_PROJECTED, tokenizer="tokenizer_2")
UNET = Component(library="diffusers", class_name="UNet2DConditionModel")


class Defaults:
    """A checkpoint's properties and default settings; see `family.Defaults`."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._unet, self._vae = checkpoint.config("unet"), checkpoint.config("vae")

    @property
    def name(self) -> str:
        """The family's name, for example "Stable Diffusion XL"."""
        if self._checkpoint.pipeline in XL_PIPELINES:
            return "Stable Diffusion XL" + " refiner" * self.base_needed
        if self._checkpoint.pipeline == INSTRUCT_PIPELINE:
            return "InstructPix2Pix"
        return f"Stable Diffusion {2 if self._unet.get('use_linear_projection') else 1}"

    @property
    def base_needed(self) -> bool:
        """Whether the model is a refiner, which lacks the CLIP-L text encoder."""
        return "text_encoder" not in self._checkpoint.networks

    @cached_property
    def size(self) -> tuple[int, int]:
        """The (width, height) that the U-Net was trained for, in pixels."""
        size = self._unet.get("sample_size")
        is_first = self._checkpoint.pipeline in (PIPELINE, INPAINT_PIPELINE)
        if is_first and type(size) is int and 0 < size < 64:
            # As in the diffusers pipeline: early files of Stable Diffusion 1 have 32.
            early = BEFORE_0_9.match(str(self._unet.get("_diffusers_version", "")))
            size = 64 if early else size
        latents = size if isinstance(size, list | tuple) else [size, size]  # height, width
        if len(latents) != 2 or not all(type(side) is int and side > 0 for side in latents):
            raise InputError(
                f"{self._checkpoint.place('unet')}: sample_size = {checks.shown(size)} gives no "
                "default size; set --width and --height"
            )
        return latents[1] * self.factor, latents[0] * self.factor

    @property
    def size_multiple(self) -> int:
        """The autoencoder's factor, in pixels.

        The U-Net needs no larger one: if it halves an odd number of latents, it crops on the way
        up, as in diffusers.
        """
        return self.factor

    @property
    def largest_side(self) -> int:
        """The largest width or height: the U-Net itself has no limit."""
        return checks.MAX_SIDE_PX

    @cached_property
    def factor(self) -> int:
        """The number of pixels per latent along each side."""
        return kl_factor(self._checkpoint)

    @cached_property
    def latent_channels(self) -> int:
        """The number of channels of the autoencoder's latents."""
        return integer(self._checkpoint, "vae", "latent_channels", 4)

    @property
    def latents(self) -> Mapping:
        """Everything that distinguishes its latents from another autoencoder's."""
        return kl_latents(self._checkpoint)

    @property
    def steps(self) -> int:
        """The number of sampling steps."""
        return self._steps_and_guidance[0]

    @property
    def guidance_scale(self) -> float:
        """The scale of classifier-free guidance, as in `Request`."""
        return self._steps_and_guidance[1]

    @property
    def _steps_and_guidance(self) -> tuple[int, float]:
        steps, guidance_scale = STEPS_AND_GUIDANCE[self._checkpoint.pipeline]
        return steps_and_guidance(self._checkpoint, steps, guidance_scale)

    @cached_property
    def sampler(self) -> str:
        """The sampler that the scheduler's config names."""
        return sampler(self._checkpoint)

    @property
    def guidance(self) -> str:
        """How the U-Net is guided: LCM's takes the guidance scale as an input."""
        takes_scale = self._unet.get("time_cond_proj_dim") is not None
        return EMBEDDED if takes_scale else CLASSIFIER_FREE

    @property
    def tokens(self) -> int:
        """The number of tokens that the text encoder takes."""
        encoders = [self._checkpoint.config(name) for name in self._checkpoint.tokenizers]
        found = (config.get("max_position_embeddings") for config in encoders)
        return next((tokens for tokens in found if isinstance(tokens, int)), unet_operations.TOKENS)

    @cached_property
    def scheduler(self) -> dict:
        """The scheduler's config, corrected as in diffusers' `StableDiffusionPipeline`.

        The pipeline corrects two values that are wrong or missing in early files, the one for
        inpainting only the first. As in diffusers,
        a value that is missing in the file is listed in "_use_default_values": a scheduler of
        another class that is made from this config uses its own default instead.
        """
        config = self._checkpoint.config("scheduler")
        if self._checkpoint.pipeline not in (PIPELINE, INPAINT_PIPELINE):
            return config
        clips = config.get("clip_sample", config.get("_class_name") in CLIP_SAMPLE_BY_DEFAULT)
        clips = clips and self._checkpoint.pipeline == PIPELINE
        corrected = {"steps_offset": 1} | ({"clip_sample": False} if clips is True else {})
        left_out = [key for key in corrected if key not in config]
        return config | corrected | ({"_use_default_values": left_out} if left_out else {})


def check_files(checkpoint: Checkpoint) -> None:
    """Rejects EDM schedulers, whose noise levels no sampler here supports."""
    scheduler = str(checkpoint.config("scheduler").get("_class_name"))
    if scheduler not in samplers.OF_SCHEDULER and scheduler.startswith(OTHER_NOISE_LEVELS):
        raise InputError(
            f"{checkpoint.place('scheduler')}: {scheduler} has noise levels that no sampler here "
            "supports (Playground 2.5 and CosXL use EDM's); use another model"
        )


def image_inputs(checkpoint: Checkpoint) -> ImageInputs:
    """Returns the images that the U-Net takes, with the defaults of diffusers' pipelines.

    A U-Net for inpainting has channels for the mask and for the latents of what it leaves out. XL's
    strength of almost 1 skips the first step and begins with the image and noise.
    """
    latents = integer(checkpoint, "vae", "latent_channels", 4)
    inpaints = integer(checkpoint, "unet", "in_channels", 4) == 2 * latents + 1
    if checkpoint.pipeline in XL_PIPELINES:
        return ImageInputs(strength=0.3, masked_strength=0.9999, needed=inpaints)
    return ImageInputs(strength=0.8, masked_strength=1.0, needed=inpaints)


def check_controlnet(checkpoint: Checkpoint, config: Mapping) -> None:
    """Raises InputError if a ControlNet has other widths or layers than the U-Net.

    The network itself is compared in full when it is built.
    """
    refuse_other_class(config, [each.class_name for each in (CONTROLNET, CONTROLNET_UNION)])
    keys = ("block_out_channels", "layers_per_block", "cross_attention_dim")
    refuse_misfit(checkpoint.config("unet"), config, keys)


def check_ip_adapter(checkpoint: Checkpoint, width: int) -> None:
    """Raises InputError if an IP-Adapter's tokens have another width than the text's."""
    ours = checkpoint.config("unet").get("cross_attention_dim", width)
    if ours != width:
        raise InputError(
            f"the IP-Adapter is for models whose cross_attention_dim is {width}, not "
            f"{checks.shown(ours)}; use one that was trained for this model"
        )


def kohya_names(checkpoint: Checkpoint, component: str) -> dict[str, Layer]:
    """Returns the layers of XL's U-Net by their original keys; see `Family.kohya_names`."""
    if component != "unet" or checkpoint.pipeline not in XL_PIPELINES:
        return {}
    return original_layers([ldm.unet_names], checkpoint, component)


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    weights = checkpoint.weights("unet")
    return (
        unet_operations.of_network(weights, height, width, tokens),
        unet_operations.of_network(unet_operations.outermost(weights), height, width, tokens),
    )


def _decoder_operations(checkpoint: Checkpoint, height: int, width: int) -> int:
    decoder = {
        key.removeprefix("decoder."): tensor
        for key, tensor in checkpoint.weights("vae").items()
        if key.startswith(("decoder.", "post_quant_conv."))
    }
    return unet_operations.of_network(decoder, height, width)


def _networks():
    from jaxdiff.families import stable_diffusion_model

    return stable_diffusion_model


STABLE_DIFFUSION = Family(
    components={"text_encoder": CLIP_TEXT, "unet": UNET, "vae": AUTOENCODER_KL},
    own_options=OWN_OPTIONS - {"skip_layers"},
    absent={  # no network checks the images
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    },
    check_files=check_files,
    defaults=Defaults,
    schedule=lambda config, bucket: noise_schedule(config, bucket.sampler),
    operations=_operations,
    decoder_operations=_decoder_operations,
    tokenizer=clip_tokenizer,
    kohya_names=kohya_names,
    image_inputs=image_inputs,
    check_controlnet=check_controlnet,
    check_ip_adapter=check_ip_adapter,
    networks=_networks,
)
INSTRUCT_PIX2PIX = replace(
    STABLE_DIFFUSION,
    image_inputs=lambda checkpoint: EDITS._replace(guidance_scale=1.5),
    check_controlnet=None,
)
# The refiner has only the second text encoder.
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION,
    absent={},
    components={
        "text_encoder": replace(CLIP_TEXT, optional=True),
        "text_encoder_2": TEXT_ENCODER_2,
        "unet": UNET,
        "vae": AUTOENCODER_KL,
    },
)
