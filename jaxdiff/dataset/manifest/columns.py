"""The meaning of a manifest's columns, in jaxdiff's format and in published prompt sets."""

import functools
from collections.abc import Iterable

from jaxdiff import checks
from jaxdiff.request import FIELDS

# The columns that jaxdiff interprets; any other is copied to the image's metadata.
COLUMNS = ("id", "seeds", "num_images", *FIELDS)
# DiffusionDB's metadata.parquet (Wang et al., 2022, arXiv:2210.14896) records with codes, for
# instance sampler 8, how its images were generated. New images use the job's settings instead.
DIFFUSIONDB = {"image_name", "prompt", "part_id", "step", "cfg", "sampler"}
# DPG-Bench's table (Hu et al., 2024, arXiv:2403.05135) has one row per question about an image.
DPG_BENCH = {"item_id", "text", "proposition_id"}


@functools.lru_cache(maxsize=256)
def meaning(names: tuple[str, ...], prompt_column: str | None = None) -> dict[str, str | None]:
    """Maps each column to its meaning, one of `COLUMNS`, or None if it is copied to the metadata.

    Names are case-insensitive (PartiPrompts writes `Prompt`), but an exact match takes precedence.

    Args:
      prompt_column: the name of the prompt column, if the user has given it.
    """
    found = {name: name if name in COLUMNS else None for name in names}
    for name in names:
        if name.casefold() in COLUMNS and name.casefold() not in found.values():
            found[name] = name.casefold()
    if found.keys() >= DIFFUSIONDB:
        found["sampler"] = None
    if has_repeated_items(names):
        found |= {"item_id": "id", "text": "prompt"}
    if "prompt" not in found.values():
        named = [name for name in names if name.casefold() == "prompts"]  # as in DrawBench
        found |= {name: "prompt" for name in named[:1]}
    if prompt_column is not None:
        found = {name: None if means == "prompt" else means for name, means in found.items()}
        found |= {prompt_column: "prompt"} if prompt_column in found else {}
    return found


def has_repeated_items(names: Iterable[str]) -> bool:
    """Returns whether only the first row of each id asks for an image, as in DPG-Bench."""
    return set(names) >= DPG_BENCH


def no_prompt(names: Iterable[str], prompt_column: str | None) -> str:
    """Returns the end of a message that reports a missing prompt column."""
    shown = checks.shown(", ".join(map(str, names)))
    return (
        f"has no column {checks.shown(prompt_column or 'prompt')}, only {shown}; "
        "name the column of prompts with --prompt-column"
    )
