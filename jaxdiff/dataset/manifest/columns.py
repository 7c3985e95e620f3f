"""The meaning of a manifest's columns, in jaxdiff's format and in published prompt sets."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Collection, Iterable

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.request import FIELDS, IMAGE_FIELDS, Options

# The columns that jaxdiff interprets; any other is copied to the image's metadata.
COLUMNS = ("id", "seeds", "num_images", *FIELDS, *IMAGE_FIELDS)
# Names that diffusers and the usual web interfaces give to them.
ALIASES = {
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "image_cfg_scale": "image_guidance_scale",
    "init_image": "image",
    "inference_steps": "steps",
    "mask": "mask_image",
    "neg_prompt": "negative_prompt",
    "num_images_per_prompt": "num_images",
    "num_inference_steps": "steps",
    "sampling_steps": "steps",
}
# Names of settings that no row can change.
OTHER_SETTINGS = (
    *(field.name for field in dataclasses.fields(Options)),
    *("batch_size", "checkpoint", "guidance", "lora", "loras", "model", "negative", "noise_seed"),
    *("prompt_2", "refiner", "resolution", "sampler_name", "vae"),
)
SIMILAR = 0.85  # by difflib's ratio: "seeed" is similar to "seed", "prompt_id" not to "prompt"
# DiffusionDB's metadata.parquet (Wang et al., 2022, arXiv:2210.14896) records with codes, for
# instance sampler 8, how its images were generated. New images use the job's settings instead.
DIFFUSIONDB = {"image_name", "prompt", "part_id", "step", "cfg", "sampler"}
# DPG-Bench's table (Hu et al., 2024, arXiv:2403.05135) has one row per question about an image.
DPG_BENCH = {"item_id", "text", "proposition_id"}
MAX_COLUMNS = 1000
MAX_NAME_CHARACTERS = 500


def check(names: tuple[str, ...]) -> None:
    """Raises BadValueError for too many columns, or for a name that is too long."""
    if len(names) > MAX_COLUMNS:
        raise BadValueError(f"{len(names)} columns; at most {MAX_COLUMNS}")
    longest = max(names, key=len, default="")
    if len(longest) > MAX_NAME_CHARACTERS:
        raise BadValueError(
            f"a column name of {len(longest)} characters; at most {MAX_NAME_CHARACTERS}"
        )


@functools.lru_cache(maxsize=64)
def meaning(names: tuple[str, ...], prompt_column: str | None = None) -> dict[str, str | None]:
    """Maps each column to its meaning, one of `COLUMNS`, or None if it is copied to the metadata.

    An exact match takes precedence. Then names match without regard to case, to spaces around them,
    and to spaces or hyphens for underscores ("Negative Prompt"); last come `ALIASES`.

    Args:
      prompt_column: the name of the prompt column, if the user has given it.
    """
    found = {name: name if name in COLUMNS else None for name in names}
    for similar in (_plain, lambda name: ALIASES.get(_plain(name))):
        for name in names:
            if found[name] is None and similar(name) in {*COLUMNS} - {*found.values()}:
                found[name] = similar(name)
    if found.keys() >= DIFFUSIONDB:
        found |= {"cfg": None, "sampler": None}
    if has_repeated_items(names):
        found |= {"item_id": "id", "text": "prompt"}
    if "prompt" not in found.values():
        named = [name for name in names if _plain(name) == "prompts"]  # as in DrawBench
        found |= {name: "prompt" for name in named[:1]}
    if prompt_column is not None:
        found = {name: None if means == "prompt" else means for name, means in found.items()}
        found |= {prompt_column: "prompt"} if prompt_column in found else {}
    return found


@functools.lru_cache(maxsize=64)
def sorted_out(
    names: tuple[str, ...], prompt_column: str | None = None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the columns with a meaning, in the order of `COLUMNS`, and those that are copied.

    Args:
      prompt_column: as for `meaning`.

    Returns:
      pairs of a meaning and its column, and the names of the other columns.

    Raises:
      BadValueError: as `check` does.
    """
    check(names)
    found = meaning(names, prompt_column)
    known = [(means, name) for name, means in found.items() if means]
    known.sort(key=lambda pair: COLUMNS.index(pair[0]))
    return known, [name for name, means in found.items() if not means]


def _plain(name: str) -> str:
    """Returns a name as this package would spell it: "Negative Prompt " is "negative_prompt"."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


@functools.lru_cache(maxsize=64)
def copied(names: tuple[str, ...], prompt_column: str | None = None) -> dict[str, str | None]:
    """Returns the columns without a meaning, and the setting that each looks like, if any.

    Those of a known set do not, nor does a column `prompt` beside the one that the user named.

    Args:
      prompt_column: as for `meaning`.
    """
    known = DIFFUSIONDB if set(names) >= DIFFUSIONDB else {"prompt"} if prompt_column else set()
    found = meaning(names, prompt_column)
    return {
        name: None if name in known else _like(name)
        for name, means in found.items()
        if means is None
    }


def _like(name: str) -> str | None:
    """Returns the column or other setting whose name is similar."""
    every = (*COLUMNS, *ALIASES, *OTHER_SETTINGS)
    near = difflib.get_close_matches(_plain(name), every, n=1, cutoff=SIMILAR)
    return ALIASES.get(near[0], near[0]) if near else None


def has_repeated_items(names: Collection[str]) -> bool:
    """Returns whether only the first row of each id asks for an image, as in DPG-Bench."""
    return "proposition_id" in names and set(names) >= DPG_BENCH


def no_prompt(names: Iterable[str], prompt_column: str | None) -> str:
    """Returns the end of a message that reports a missing prompt column."""
    names = [*map(str, names)]
    shown = checks.shown(", ".join(names))
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        separator = "semicolons" if ";" in names[0] else "tabs"
        return f"has one column, {shown}: it is separated by {separator}; save it with commas"
    return (
        f"has no column {checks.shown(prompt_column or 'prompt')}, only {shown}; "
        "name the column of prompts with --prompt-column"
    )
