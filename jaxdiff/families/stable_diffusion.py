"""Stable Diffusion 1, 2 and XL with its refiner, Turbo and LCM: a U-Net with CLIP text encoders.

See Rombach et al., 2022, arXiv:2112.10752, and Podell et al., 2023, arXiv:2307.01952.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import INDEX, Component
from jaxdiff.checkpoint.single_file import unet_names
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.families import unet_operations
from jaxdiff.families.family import Family
from jaxdiff.families.tokens import Tokenizer, fitting

PIPELINE = "StableDiffusionPipeline"
LCM_PIPELINE = "LatentConsistencyModelPipeline"
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
STEPS_AND_GUIDANCE = {  # the defaults of each pipeline's __call__ in diffusers
    PIPELINE: (50, 7.5),
    LCM_PIPELINE: (4, 8.5),
    **dict.fromkeys(XL_PIPELINES, (50, 5.0)),
}
# Our own entry in `model_index.json`: the {"steps", "guidance_scale"} that a model was trained for.
# diffusers ignores entries that begin with an underscore.
OWN_DEFAULTS = "_defaults"
OTHER_NOISE_LEVELS = ("EDM", "FlowMatch")  # prefixes of schedulers with other noise levels
CLIP_SAMPLE_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
BEFORE_0_9 = re.compile(r"0\.[0-8](\.|$)")  # a version of diffusers
# The keys that scale the autoencoder's latents for the U-Net, and the class's defaults.
LATENTS = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
VOCABULARY = 49408  # CLIP's, if the text encoder's config gives no number
TEXT_PREFIX = "text_model."
BUFFER = "embeddings.position_ids"  # 0, 1, 2, ...: in old CLIP files
OLD_ATTENTION = re.compile(r"\b(attentions\.\d+)\.(query|key|value|proj_attn)\.")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _without_buffer(key: str) -> str | None:
    return None if key.endswith(BUFFER) else key


def _new_attention(key: str) -> str:
    return OLD_ATTENTION.sub(lambda found: f"{found[1]}.{NEW_ATTENTION[found[2]]}.", key)


_clip = partial(Component, library="transformers", prefix=TEXT_PREFIX, plain_key=_without_buffer)
TEXT_ENCODER = _clip(class_name="CLIPTextModel", tokenizer="tokenizer")
TEXT_ENCODER_2 = _clip(class_name="CLIPTextModelWithProjection", tokenizer="tokenizer_2")
UNET = Component(library="diffusers", class_name="UNet2DConditionModel")
VAE = Component(library="diffusers", class_name="AutoencoderKL", plain_key=_new_attention)


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
        return f"Stable Diffusion {2 if self._unet.get('use_linear_projection') else 1}"

    @property
    def base_needed(self) -> bool:
        """Whether the model is a refiner, which lacks the CLIP-L text encoder."""
        return "text_encoder" not in self._checkpoint.networks

    @cached_property
    def size(self) -> tuple[int, int]:
        """The (width, height) that the U-Net was trained for, in pixels."""
        size = self._unet.get("sample_size")
        if self._checkpoint.pipeline == PIPELINE and type(size) is int and 0 < size < 64:
            # As in the diffusers pipeline: early files of Stable Diffusion 1 have 32.
            early = BEFORE_0_9.match(str(self._unet.get("_diffusers_version", "")))
            size = 64 if early else size
        latents = size if isinstance(size, list | tuple) else [size, size]  # height, width
        if len(latents) != 2 or not all(type(side) is int and side > 0 for side in latents):
            raise InputError(
                f"{self._checkpoint.place('unet')}: sample_size = {checks.shown(size)} gives no "
                "default size; set --width and --height"
            )
        return latents[1] * self.size_multiple, latents[0] * self.size_multiple

    @cached_property
    def size_multiple(self) -> int:
        """The autoencoder's factor, in pixels.

        The U-Net needs no larger one: if it halves an odd number of latents, it crops on the way
        up, as in diffusers.
        """
        channels = self._vae.get("block_out_channels", ())
        if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= 16:
            raise InputError(
                f"{self._checkpoint.place('vae')}: block_out_channels must be a list of 1 to 16 "
                "numbers"
            )
        return 2 ** (len(channels) - 1)

    @cached_property
    def latent_channels(self) -> int:
        """The number of channels of the autoencoder's latents."""
        channels = self._vae.get("latent_channels", 4)
        if type(channels) is not int or channels < 1:
            raise InputError(
                f"{self._checkpoint.place('vae')}: latent_channels = {checks.shown(channels)} must "
                "be a positive whole number"
            )
        return channels

    @property
    def latents(self) -> Mapping:
        """Everything that distinguishes its latents from another autoencoder's."""
        shape = {"size_multiple": self.size_multiple, "channels": self.latent_channels}
        return shape | {key: self._vae.get(key, default) for key, default in LATENTS.items()}

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
        """The values in the model's index, or else the defaults of its diffusers pipeline."""
        steps, guidance_scale = STEPS_AND_GUIDANCE[self._checkpoint.pipeline]
        own = self._checkpoint.index.get(OWN_DEFAULTS)
        own = own if isinstance(own, dict) else {}
        steps = own.get("steps", steps)
        guidance_scale = own.get("guidance_scale", guidance_scale)
        try:
            return (
                checks.integer("steps", steps, 1, checks.MAX_STEPS),
                checks.number("guidance_scale", guidance_scale, 0, checks.MAX_GUIDANCE_SCALE),
            )
        except checks.BadValueError as problem:
            place = self._checkpoint.path / INDEX
            raise InputError(f"{place}: {OWN_DEFAULTS}: {problem}") from None

    @cached_property
    def sampler(self) -> str:
        """The sampler that the scheduler's config names."""
        config = self._checkpoint.config("scheduler")
        sampler = samplers.of_config(config)
        if sampler is None:
            name = checks.shown(config.get("_class_name"))
            raise InputError(
                f"{self._checkpoint.place('scheduler')}: {name} is not "
                f"supported; choose a --sampler: {', '.join(sorted(samplers.SAMPLERS))}"
            )
        return sampler

    @property
    def guidance_is_input(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input, as LCM's does."""
        return self._unet.get("time_cond_proj_dim") is not None

    @property
    def tokens(self) -> int:
        """The number of tokens that the text encoder takes."""
        encoders = [self._checkpoint.config(name) for name in self._checkpoint.tokenizers]
        found = (config.get("max_position_embeddings") for config in encoders)
        return next((tokens for tokens in found if isinstance(tokens, int)), unet_operations.TOKENS)

    @cached_property
    def scheduler(self) -> dict:
        """The scheduler's config, corrected as in diffusers' `StableDiffusionPipeline`.

        The pipeline corrects two values that are wrong or missing in early files. As in diffusers,
        a value that is missing in the file is listed in "_use_default_values": a scheduler of
        another class that is made from this config uses its own default instead.
        """
        config = self._checkpoint.config("scheduler")
        if self._checkpoint.pipeline != PIPELINE:
            return config
        clips = config.get("clip_sample", config.get("_class_name") in CLIP_SAMPLE_BY_DEFAULT)
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


def kohya_names(checkpoint: Checkpoint, component: str) -> dict[str, str]:
    """Returns the original names of XL's U-Net layers, which kohya's files use, with our keys."""
    if component != "unet" or checkpoint.pipeline not in XL_PIPELINES:
        return {}
    # No more than there are weights, whatever the config says: it has not been read strictly.
    known = islice(unet_names(checkpoint.config("unet")), len(checkpoint.weights("unet")))
    try:
        return {original: key for key, original, _ in known}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{checkpoint.place('unet')} does not describe a U-Net; copy the checkpoint again"
        ) from error


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


def _tokenizer(name: str, folder: Path, config: Mapping) -> Tokenizer:
    from jaxdiff.families.clip_tokens import ClipTokenizer  # takes a second to import

    positions = config.get("max_position_embeddings")
    tokenizer = ClipTokenizer(
        folder, positions if isinstance(positions, int) else unet_operations.TOKENS
    )
    return fitting(tokenizer, folder, name, config.get("vocab_size", VOCABULARY))


def _networks():
    from jaxdiff.families import stable_diffusion_model

    return stable_diffusion_model


STABLE_DIFFUSION = Family(
    components={"text_encoder": TEXT_ENCODER, "unet": UNET, "vae": VAE},
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
    tokenizer=_tokenizer,
    kohya_names=kohya_names,
    networks=_networks,
)
# The refiner has only the second text encoder.
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION,
    absent={},
    components={
        "text_encoder": replace(TEXT_ENCODER, optional=True),
        "text_encoder_2": TEXT_ENCODER_2,
        "unet": UNET,
        "vae": VAE,
    },
)
