"""What a manifest's columns mean, in jaxdiff's own form and in those of published prompt sets."""

import functools
from collections.abc import Iterable

from jaxdiff import checks
from jaxdiff.request import FIELDS

# The columns that mean something; any other is carried through to the image's metadata.
COLUMNS = ("id", "seeds", "num_images", *FIELDS)
# DiffusionDB's metadata.parquet (Wang et al., 2022, arXiv:2210.14896) says by codes, such as
# sampler 8, how its images were made. How new ones are made is the job's to say.
DIFFUSIONDB = {"image_name", "prompt", "part_id", "step", "cfg", "sampler"}
# DPG-Bench's table (Hu et al., 2024, arXiv:2403.05135) has a row for each question about an image.
DPG_BENCH = {"item_id", "text", "proposition_id"}


@functools.lru_cache(maxsize=256)
def meaning(names: tuple[str, ...], prompt_column: str | None = None) -> dict[str, str | None]:
    """What each column means, one of `COLUMNS`, or None for one that is carried through.

    Capitals do not matter (PartiPrompts writes `Prompt`), but the exact name goes first.

    Args:
      prompt_column: the name of the one that holds the prompts, where the user has said it.
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
        named = [name for name in names if name.casefold() == "prompts"]  # DrawBench's copies
        found |= {name: "prompt" for name in named[:1]}
    if prompt_column is not None:
        found = {name: None if means == "prompt" else means for name, means in found.items()}
        found |= {prompt_column: "prompt"} if prompt_column in found else {}
    return found


def has_repeated_items(names: Iterable[str]) -> bool:
    """Whether the first row of an id asks for an image, and its others ask for nothing more."""
    return set(names) >= DPG_BENCH


def no_prompt(names: Iterable[str], prompt_column: str | None) -> str:
    """Why none of the columns holds prompts, as the end of a sentence."""
    shown = checks.shown(", ".join(map(str, names)))
    return (
        f"has no column {checks.shown(prompt_column or 'prompt')}, but {shown}; "
        "--prompt-column says which holds the prompts"
    )
