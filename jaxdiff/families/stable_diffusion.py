"""Stable Diffusion 1, 2 and XL with its refiner, Turbo and LCM: a U-Net over CLIP's text.

Rombach et al., 2022, arXiv:2112.10752; Podell et al., 2023, arXiv:2307.01952.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.single_file import unet_names
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.families import unet_operations
from jaxdiff.families.family import Family

PIPELINE = "StableDiffusionPipeline"
LCM_PIPELINE = "LatentConsistencyModelPipeline"
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
STEPS_AND_GUIDANCE = {  # of each pipeline's __call__ in diffusers
    PIPELINE: (50, 7.5),
    LCM_PIPELINE: (4, 8.5),
    **dict.fromkeys(XL_PIPELINES, (50, 5.0)),
}
# Our own entry of `model_index.json`: the {"steps", "guidance_scale"} that a model is made for.
# diffusers ignores entries that begin with an underscore.
OWN_DEFAULTS = "_defaults"
OTHER_NOISE_LEVELS = ("EDM", "FlowMatch")  # how the names of schedulers with these begin
CLIP_SAMPLE_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
BEFORE_0_9 = re.compile(r"0\.[0-8](\.|$)")  # a version of diffusers
# What turns the autoencoder's latents into the U-Net's, and the class's defaults.
LATENTS = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
TEXT_PREFIX = "text_model."
BUFFER = "embeddings.position_ids"  # 0, 1, 2, ...: old CLIP files carry it
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
    """`family.Defaults` of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._unet, self._vae = checkpoint.config("unet"), checkpoint.config("vae")

    @property
    def name(self) -> str:
        """Of its family, such as "Stable Diffusion XL"."""
        if self._checkpoint.pipeline in XL_PIPELINES:
            return "Stable Diffusion XL" + " refiner" * self.base_needed
        return f"Stable Diffusion {2 if self._unet.get('use_linear_projection') else 1}"

    @property
    def base_needed(self) -> bool:
        """Whether it is a refiner, which has no text encoder of CLIP-L."""
        return "text_encoder" not in self._checkpoint.networks

    @cached_property
    def size(self) -> tuple[int, int]:
        """The size that the U-Net was trained for."""
        size = self._unet.get("sample_size")
        if self._checkpoint.pipeline == PIPELINE and type(size) is int and 0 < size < 64:
            # As the pipeline does: early files of Stable Diffusion 1 have 32.
            early = BEFORE_0_9.match(str(self._unet.get("_diffusers_version", "")))
            size = 64 if early else size
        latents = size if isinstance(size, list | tuple) else [size, size]  # height, width
        if len(latents) != 2 or not all(type(side) is int and side > 0 for side in latents):
            raise InputError(
                f"{self._checkpoint.place('unet')}: sample_size = {size!r} gives no default size; "
                "ask for a --width and a --height"
            )
        return latents[1] * self.size_multiple, latents[0] * self.size_multiple

    @cached_property
    def size_multiple(self) -> int:
        """The autoencoder's factor alone.

        Where a U-Net halves an odd number of latents, it crops on the way up, as diffusers does.
        """
        channels = self._vae.get("block_out_channels", ())
        if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= 16:
            raise InputError(f"{self._checkpoint.place('vae')}: no usable block_out_channels")
        return 2 ** (len(channels) - 1)

    @cached_property
    def latent_channels(self) -> int:
        """The channels of the autoencoder's latents."""
        channels = self._vae.get("latent_channels", 4)
        if type(channels) is not int or channels < 1:
            raise InputError(
                f"{self._checkpoint.place('vae')}: latent_channels = {channels!r} must be a "
                "positive number"
            )
        return channels

    @property
    def latents(self) -> Mapping:
        """All that distinguishes its latents from another autoencoder's."""
        shape = {"size_multiple": self.size_multiple, "channels": self.latent_channels}
        return shape | {key: self._vae.get(key, default) for key, default in LATENTS.items()}

    @property
    def steps(self) -> int:
        """Sampling steps."""
        return self._steps_and_guidance[0]

    @property
    def guidance_scale(self) -> float:
        """As in `Request`."""
        return self._steps_and_guidance[1]

    @property
    def _steps_and_guidance(self) -> tuple[int, float]:
        """Those that the model names in its index, or its pipeline takes in diffusers."""
        steps, guidance_scale = STEPS_AND_GUIDANCE[self._checkpoint.pipeline]
        own = self._checkpoint.index.get(OWN_DEFAULTS)
        own = own if isinstance(own, dict) else {}
        return own.get("steps", steps), own.get("guidance_scale", guidance_scale)

    @cached_property
    def sampler(self) -> str:
        """The sampler that the scheduler's config names."""
        config = self._checkpoint.config("scheduler")
        sampler = samplers.of_config(config)
        if sampler is None:
            raise InputError(
                f"{self._checkpoint.place('scheduler')} names {config.get('_class_name')}, which "
                f"is not built; ask for a --sampler: {', '.join(sorted(samplers.SAMPLERS))}"
            )
        return sampler

    @property
    def guidance_is_input(self) -> bool:
        """Whether it is distilled, as LCM is."""
        return self._unet.get("time_cond_proj_dim") is not None

    @property
    def tokens(self) -> int:
        """Positions of the text encoder."""
        encoders = [self._checkpoint.config(name) for name in self._checkpoint.tokenizers]
        found = (config.get("max_position_embeddings") for config in encoders)
        return next((tokens for tokens in found if isinstance(tokens, int)), unet_operations.TOKENS)

    @cached_property
    def scheduler(self) -> dict:
        """`StableDiffusionPipeline` corrects two values that early files have wrong or leave out.

        Where the file leaves one out, it is listed, as in diffusers, in "_use_default_values": a
        scheduler of another class that is made from this config takes its own default instead.
        """
        config = self._checkpoint.config("scheduler")
        if self._checkpoint.pipeline != PIPELINE:
            return config
        clips = config.get("clip_sample", config.get("_class_name") in CLIP_SAMPLE_BY_DEFAULT)
        corrected = {"steps_offset": 1} | ({"clip_sample": False} if clips is True else {})
        left_out = [key for key in corrected if key not in config]
        return config | corrected | ({"_use_default_values": left_out} if left_out else {})


def check_files(checkpoint: Checkpoint) -> None:
    """Rejects EDM schedulers: no sampler here has their noise levels."""
    scheduler = str(checkpoint.config("scheduler").get("_class_name"))
    if scheduler not in samplers.OF_SCHEDULER and scheduler.startswith(OTHER_NOISE_LEVELS):
        raise InputError(
            f"{checkpoint.place('scheduler')}: {scheduler} has other noise levels than Stable "
            "Diffusion, which no sampler here takes (Playground 2.5 and CosXL have EDM's); name "
            "another model"
        )


def kohya_names(checkpoint: Checkpoint, component: str) -> dict[str, str]:
    """kohya's files for XL call the U-Net's layers by the names of the original code."""
    if component != "unet" or checkpoint.pipeline not in XL_PIPELINES:
        return {}
    return {original: key for key, original, _ in unet_names(checkpoint.config("unet"))}


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


def _read_configs(parsed: Mapping[str, dict]) -> dict:
    from jaxdiff.families import stable_diffusion_model

    return stable_diffusion_model.read_configs(parsed)


def _module(component: str, config):
    from jaxdiff.families import stable_diffusion_model

    return stable_diffusion_model.module(component, config)


def _build(configs: Mapping, index: Mapping, **how):
    from jaxdiff.families import stable_diffusion_model

    return stable_diffusion_model.build(configs, index, **how)


def _with_guidance_input(configs: Mapping, width: int) -> dict:
    from jaxdiff.families import stable_diffusion_model

    return stable_diffusion_model.with_guidance_input(configs, width)


STABLE_DIFFUSION = Family(
    components={"text_encoder": TEXT_ENCODER, "unet": UNET, "vae": VAE},
    denoiser="unet",
    codec="vae",
    absent={  # no network looks over what these pipelines make
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    },
    check_files=check_files,
    defaults=Defaults,
    schedule=lambda config, bucket: noise_schedule(config, bucket.sampler),
    operations=_operations,
    decoder_operations=_decoder_operations,
    kohya_names=kohya_names,
    read_configs=_read_configs,
    module=_module,
    build=_build,
    with_guidance_input=_with_guidance_input,
)
# The refiner has the second text encoder alone.
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
