"""Stable Diffusion's upscalers: U-Nets that enlarge the image of a row as its prompt says.

The x4 upscaler (Rombach et al., 2022, arXiv:2112.10752, section 4.5) sees the image's pixels, to
which noise was added: for every row that of timestep 20 of 1000, diffusers' default for
`noise_level`. The latent x2 upscaler, which Katherine Crowson trained, sees the image's latents.

Width and height of a request are those of the enlarged image.
"""

from dataclasses import replace
from functools import cached_property

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError
from jaxdiff.families import stable_diffusion, unet_operations
from jaxdiff.families.config_values import kl_factor, steps_and_guidance
from jaxdiff.families.family import CLASSIFIER_FREE, OWN_OPTIONS
from jaxdiff.families.image_inputs import EDITS
from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION
from jaxdiff.families.upscaling_values import LATENT_FACTOR, NOISE_LEVEL

X4_PIPELINE = "StableDiffusionUpscalePipeline"
LATENT_PIPELINE = "StableDiffusionLatentUpscalePipeline"
STEPS, GUIDANCE_SCALE = 75, 9.0  # the defaults of both pipelines in diffusers
IMAGE_SCHEDULER = "low_res_scheduler"  # the folder of the schedule of that noise
LATENT_BLOCKS = 4  # of its U-Net, along each way
PREDICTS_X0 = ("sample", "original_sample")


class Defaults(stable_diffusion.Defaults):
    """What the defaults of both upscalers have in common; see `family.Defaults`."""

    guidance = CLASSIFIER_FREE

    @property
    def _steps_and_guidance(self) -> tuple[int, float]:
        return steps_and_guidance(self._checkpoint, STEPS, GUIDANCE_SCALE)


class X4Defaults(Defaults):
    """The x4 upscaler's properties and default settings."""

    name = "Stable Diffusion x4 upscaler"

    @property
    def size_multiple(self) -> int:
        """In pixels: as in diffusers, the sides of the image are multiples of 4."""
        return 4 * self.factor


class LatentDefaults(Defaults):
    """The latent x2 upscaler's properties and default settings."""

    name = "Stable Diffusion latent x2 upscaler"

    @property
    def size_multiple(self) -> int:
        """In pixels: its U-Net halves the latents before each block but the first."""
        return self.factor * 2 ** (LATENT_BLOCKS - 1)

    @cached_property
    def scheduler(self) -> dict:
        """The scheduler's config, with what the network predicts.

        diffusers' pipeline turns that into x_0, so the file says "sample". By table 1 of Karras et
        al., 2022, arXiv:2206.00364, the network itself predicts -v.
        """
        config = self._checkpoint.config("scheduler")
        said = config.get("prediction_type", "epsilon")
        if said not in PREDICTS_X0:
            raise InputError(
                f"{self._checkpoint.place('scheduler')}: prediction_type = {checks.shown(said)} is "
                'not supported by this pipeline; set it to "sample"'
            )
        return config | {"prediction_type": "v_prediction"}


def image_noise(checkpoint: Checkpoint) -> tuple[float, float]:
    """Returns the signal and the noise in what the x4 upscaler sees; see `Family.image_noise`."""
    try:
        schedule = noise_schedule(checkpoint.config(IMAGE_SCHEDULER), "ddpm")
    except InputError as problem:
        raise InputError(f"{checkpoint.place(IMAGE_SCHEDULER)}: {problem}") from None
    if schedule.num_train_timesteps <= NOISE_LEVEL:
        raise InputError(
            f"{checkpoint.place(IMAGE_SCHEDULER)}: num_train_timesteps = "
            f"{schedule.num_train_timesteps} must be above {NOISE_LEVEL}; copy the checkpoint again"
        )
    signal = schedule.alpha_bars()[NOISE_LEVEL]
    return float(signal**0.5), float((1 - signal) ** 0.5)


def _check_x4(checkpoint: Checkpoint) -> None:
    stable_diffusion.check_files(checkpoint)
    image_noise(checkpoint)


def _check_latent(checkpoint: Checkpoint) -> None:
    stable_diffusion.check_files(checkpoint)
    _ = checkpoint.defaults.scheduler  # raises for another prediction


def _x4_operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    text_only = checkpoint.config("unet").get("only_cross_attention", False)
    weights = {}
    for key, tensor in checkpoint.weights("unet").items():
        if _sees_text_only(key, text_only):  # counted as the attention to the text is
            key = key.replace(".attn1.", ".attn1.attn2.")
        if not key.startswith("class_embedding."):  # only looked up
            weights[key] = tensor
    return (
        unet_operations.of_network(weights, height, width, tokens),
        unet_operations.of_network(unet_operations.outermost(weights), height, width, tokens),
    )


def _sees_text_only(key: str, flags: object) -> bool:
    """Whether a U-Net's layer is in a block whose transformers see the text only."""
    found = unet_operations.BLOCK.match(key)
    if found is None or not isinstance(flags, list):
        return found is not None and flags is True
    blocks = flags if found[1] == "down_blocks" else flags[::-1]
    return int(found[2]) < len(blocks) and blocks[int(found[2])] is True


def _latent_operations(
    checkpoint: Checkpoint, height: int, width: int, tokens: int
) -> tuple[int, int]:
    """Counts block by block, because resizing, which has no weights, is between the blocks."""
    blocks: dict[int, dict] = {}
    total = 0
    for key, tensor in checkpoint.weights("unet").items():
        if key.startswith("time_") or ".linear." in key:  # of the embedding: once an image
            total += 2 * tensor.size * (len(tensor.shape) > 1)
            continue
        found = unet_operations.BLOCK.match(key)
        place = int(found[2]) if found else 0
        level = LATENT_BLOCKS - 1 - place if found and found[1] == "up_blocks" else place
        blocks.setdefault(level, {})[key] = tensor
    for level, weights in blocks.items():
        total += unet_operations.of_network(weights, height >> level, width >> level, tokens)
    return total, total  # it has no deep features to reuse


def _x4_networks():
    from jaxdiff.families import upscaling_x4_model

    return upscaling_x4_model


def _latent_networks():
    from jaxdiff.families import upscaling_latent_model

    return upscaling_latent_model


X4_UPSCALER = replace(
    STABLE_DIFFUSION,
    own_options=OWN_OPTIONS - {"guess_mode", "skip_layers"},
    check_files=_check_x4,
    defaults=X4Defaults,
    operations=_x4_operations,
    image_inputs=lambda checkpoint: EDITS._replace(enlarges=kl_factor(checkpoint)),
    image_noise=image_noise,
    further_configs=(IMAGE_SCHEDULER,),
    check_controlnet=None,
    check_ip_adapter=None,
    networks=_x4_networks,
)
LATENT_UPSCALER = replace(
    X4_UPSCALER,
    own_options=X4_UPSCALER.own_options - {"deep_cache"},
    absent={},
    check_files=_check_latent,
    defaults=LatentDefaults,
    operations=_latent_operations,
    image_inputs=lambda checkpoint: EDITS._replace(enlarges=LATENT_FACTOR),
    image_noise=lambda checkpoint: None,
    further_configs=(),
    networks=_latent_networks,
)
