"""What an unknown option or command is likely to mean: misspellings, and other tools' names."""

import difflib
from collections.abc import Collection

from jaxdiff.dataset.manifest.columns import ALIASES

# Names that diffusers, web interfaces, MaxDiffusion and older scripts give to our options.
OTHER_NAMES = {
    **ALIASES,
    "activations_dtype": "dtype",
    "batch_count": "num_images",
    "checkpoint": "model",
    "ckpt": "model",
    "ddim_eta": "eta",
    "ddim_steps": "steps",
    "from_file": "manifest",
    "h": "height",
    "input": "manifest",
    "lora_path": "lora",
    "model_id": "model",
    "model_path": "model",
    "n": "num_images",
    "n_iter": "num_images",
    "n_samples": "num_images",
    "negative": "negative_prompt",
    "num": "num_images",
    "num_samples": "num_images",
    "out": "output",
    "outdir": "output",
    "output_dir": "output",
    "per_device_batch_size": "batch_size",
    "pretrained_model_name_or_path": "model",
    "prompts": "manifest",
    "sampler_name": "sampler",
    "sampling_method": "sampler",
    "save_dir": "output",
    "scale": "guidance_scale",
    "torch_dtype": "dtype",
    "w": "width",
    "weights_dtype": "dtype",
}


def closest(name: str, names: Collection[str]) -> str | None:
    """Returns the option that an unknown one is likely to mean, without hyphens; None if unclear.

    Args:
      name: with or without hyphens.
      names: of the options to choose from, with underscores.
    """
    plain = name.strip("-").replace("-", "_").lower()
    if (known := OTHER_NAMES.get(plain)) in names and plain not in names:
        return known
    return next(iter(difflib.get_close_matches(plain, names, n=1)), None)


def suggest(name: str, names: Collection[str]) -> str:
    """Returns the end of a message: a suggestion for an unknown option, or nothing."""
    option = closest(name, names)
    return f"; did you mean --{option.replace('_', '-')}?" if option else ""
