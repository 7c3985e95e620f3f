"""Reads a checkpoint's properties from configs that have not been read strictly. No JAX."""

from collections.abc import Mapping

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import INDEX
from jaxdiff.diffusion import samplers
from jaxdiff.errors import InputError

# Our own entry in `model_index.json`: the {"steps", "guidance_scale"} that a model was trained for.
# diffusers ignores entries that begin with an underscore.
OWN_DEFAULTS = "_defaults"
# The keys that scale the latents of `AutoencoderKL` for the denoiser, and the class's defaults.
KL_LATENTS = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
LARGEST = 2**20  # of any size or number of channels


def integer(checkpoint: Checkpoint, component: str, key: str, default: int) -> int:
    """Returns a size from a network's config.

    Raises:
      InputError: if it is not a positive whole number.
    """
    value = checkpoint.config(component).get(key, default)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise InputError(
            f"{checkpoint.place(component)}: {key} = {checks.shown(value)} must be a positive "
            "whole number"
        )
    return value


def kl_factor(checkpoint: Checkpoint) -> int:
    """Returns the number of pixels per latent along each side of an `AutoencoderKL`."""
    return factor_of_blocks(checkpoint, "block_out_channels")


def factor_of_blocks(checkpoint: Checkpoint, key: str) -> int:
    """Returns the number of pixels per latent of an autoencoder, by the key that lists its blocks.

    Raises:
      InputError: if the config does not say.
    """
    channels = checkpoint.config("vae").get(key, ())
    if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= 16:
        raise InputError(f"{checkpoint.place('vae')}: {key} must be a list of 1 to 16 numbers")
    return 2 ** (len(channels) - 1)


def kl_latents(checkpoint: Checkpoint) -> Mapping:
    """Returns everything that distinguishes the latents of an `AutoencoderKL` from another's."""
    config = checkpoint.config("vae")
    shape = {
        "size_multiple": kl_factor(checkpoint),
        "channels": integer(checkpoint, "vae", "latent_channels", 4),
    }
    return shape | {key: config.get(key, default) for key, default in KL_LATENTS.items()}


def steps_and_guidance(
    checkpoint: Checkpoint, steps: int, guidance_scale: float
) -> tuple[int, float]:
    """Returns the values in the model's index, or else the given ones.

    Raises:
      InputError: if they are not valid.
    """
    own = checkpoint.index.get(OWN_DEFAULTS)
    own = own if isinstance(own, dict) else {}
    steps = own.get("steps", steps)
    guidance_scale = own.get("guidance_scale", guidance_scale)
    try:
        return (
            checks.integer("steps", steps, 1, checks.MAX_STEPS),
            checks.number("guidance_scale", guidance_scale, 0, checks.MAX_GUIDANCE_SCALE),
        )
    except checks.BadValueError as problem:
        place = checkpoint.path / INDEX
        raise InputError(f"{place}: {OWN_DEFAULTS}: {problem}") from None


def sampler(checkpoint: Checkpoint) -> str:
    """Returns the sampler that the scheduler's config names.

    Raises:
      InputError: if it is not supported.
    """
    config = checkpoint.config("scheduler")
    found = samplers.of_config(config)
    if found is None:
        name = checks.shown(config.get("_class_name"))
        raise InputError(
            f"{checkpoint.place('scheduler')}: {name} is not supported; choose a --sampler: "
            f"{', '.join(sorted(samplers.SAMPLERS))}"
        )
    return found
