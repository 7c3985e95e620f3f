"""Writes and reads image folders in the layouts of the benchmarks' own scorers.

The scorers list their folders: some skip a missing image, some use the next image instead, and some
fail on an unknown file. So an exported folder is complete and holds nothing else, or does not
exist.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.errors import InputError
from jaxdiff.evaluation.layouts.forms import (
    GENEVAL,
    LAYOUTS,
    T2I_COMPBENCH,
    TILES,
    Layout,
    Slot,
    encoded,
)
from jaxdiff.evaluation.records import Picture, Prompt
from jaxdiff.images.image_files import decode

MAX_FILE_BYTES = 2**28
MAX_ROW_BYTES = 2**20
MAGIC = {"png": b"\x89PNG\r\n", "jpg": b"\xff\xd8\xff"}


def export(
    layout: str,
    pictures: Iterable[Picture],
    prompts: list[Prompt],
    images: int,
    directory: Path,
    beside_others: bool = False,
) -> int:
    """Writes pictures, in any order, in a layout of `LAYOUTS`; returns their number.

    Only one picture, or the pictures of one grid, are in memory at a time.

    Args:
      prompts: all prompts of the benchmark, in its order.
      images: the number of images per prompt; all must be present.
      directory: must be new or empty; written completely or not at all.
      beside_others: allow other files in the directory, and replace folders with a number as their
        name. If this is interrupted, exporting again repairs the directory.

    Raises:
      InputError: for a prompt that the layout cannot name, or a picture that is missing, could not
        be generated, is surplus or cannot be read; leaves nothing behind.
    """
    how, slots = LAYOUTS[layout], _slots(layout, prompts)
    if how.images not in (None, images):
        raise InputError(
            f"layout {layout} takes {how.images} images of each prompt, not {images}; set "
            f"--images {how.images}"
        )
    if directory.is_file() or (
        not beside_others and directory.is_dir() and any(directory.iterdir())
    ):
        raise InputError(f"{directory} already exists and is not empty; give a new directory")
    parent = directory if beside_others else directory.parent
    unfinished = parent / f".{directory.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        count = _write(how, pictures, slots, images, unfinished)
        if beside_others:
            _replace_numbered(directory, unfinished)
        else:
            os.rename(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count


def read_layout(layout: str, directory: Path, prompts: list[Prompt]) -> Iterator[Picture]:
    """Yields the pictures of a folder in a layout of `LAYOUTS`, ordered by prompt.

    Each prompt must have as many images as the first one. A picture's key is its file's path.

    Raises:
      InputError: naming a file that is missing, not an image, or of another prompt.
    """
    how, slots = LAYOUTS[layout], _slots(layout, prompts)
    first = next(iter(slots.values()))
    images = how.images or 1
    while not how.images and _is_there(directory, how.names(first, images, images)):
        images += 1
    for slot in slots.values():
        if how is GENEVAL:
            _check_prompt(directory, slot)
        for index, (name, content) in enumerate(_files(how, directory, slot, images)):
            yield Picture(name, slot.prompt, index, -1, content, how.extension)
        extra = () if how.images or how is T2I_COMPBENCH else how.names(slot, images, images)
        if _is_there(directory, extra):  # with running numbers, the next prompt lacks images
            raise InputError(
                f"{directory / extra[0]} is one too many: the first prompt has {images} images; "
                "give each prompt the same number"
            )


def _slots(layout: str, prompts: list[Prompt]) -> dict[str, Slot]:
    """Returns the slots by prompt id; raises InputError if the layout cannot name a prompt."""
    slots, seen = {}, Counter()
    for position, prompt in enumerate(prompts):
        slot = Slot(prompt, position, seen[prompt.category])
        seen[prompt.category] += 1
        try:
            LAYOUTS[layout].check(prompt)
        except BadValueError as problem:
            raise InputError(
                f"layout {layout} cannot hold prompt {checks.shown(prompt.id)}: {problem}"
            ) from None
        if prompt.id in slots:
            raise InputError(f"two prompts have the id {checks.shown(prompt.id)}; rename one")
        slots[prompt.id] = slot
    if not slots:
        raise InputError("there are no prompts to lay out; give at least one")
    return slots


def _write(
    how: Layout, pictures: Iterable[Picture], slots: dict[str, Slot], images: int, folder: Path
) -> int:
    there, size = np.zeros((len(slots), images), bool), None
    for picture in pictures:
        slot, index = slots.get(picture.prompt.id), picture.index
        what = f"image {index} of prompt {checks.shown(picture.prompt.id)}"
        if slot is None:
            raise InputError(f"{what}: the benchmark does not have this prompt")
        if index >= images:
            raise InputError(f"{what} is one too many: each prompt has {images}")
        if there[slot.position, index]:
            raise InputError(f"{what} exists twice")
        if picture.image is None:
            raise InputError(
                f"{what} could not be generated; scorers misread a folder with missing images"
            )
        try:
            pixels = decode(picture.image)
        except ValueError as problem:
            raise InputError(f"{what}: {problem}") from None
        size = size or pixels.shape
        if how.is_tiled and not pixels.shape[0] == pixels.shape[1] == size[0]:
            raise InputError(f"{what}: in this layout, all images must be squares of one size")
        file = _file(how, folder, slot, index, images)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_converted(picture.image, pixels, how.extension))
        there[slot.position, index] = True
        if there[slot.position].all():
            files = [_file(how, folder, slot, each, images) for each in range(images)]
            how.finish(folder, slot, files)
    for slot in slots.values():
        if not there[slot.position].all():
            missing = np.argmin(there[slot.position])
            raise InputError(
                f"image {missing} of prompt {checks.shown(slot.prompt.id)} is missing; scorers "
                "misread a folder with missing images"
            )
    how.close(folder, list(slots.values()), images)
    return there.size


def _file(how: Layout, folder: Path, slot: Slot, index: int, images: int) -> Path:
    if how.is_tiled:
        return folder / TILES / f"{slot.position}-{index}.png"
    return folder / how.names(slot, index, images)[0]


def _converted(content: bytes, pixels: np.ndarray, extension: str) -> bytes:
    """Returns the file unchanged if it already has the wanted format, which is lossless."""
    if content.startswith(MAGIC[extension]):
        return content
    return encoded(Image.fromarray(pixels), extension)


def _replace_numbered(directory: Path, new: Path) -> None:
    """Moves the new files in, after removing numbered folders of earlier exports."""
    for old in directory.iterdir():
        if old.is_dir() and old.name.isdigit():
            shutil.rmtree(old)
    for entry in sorted(new.iterdir()):
        os.rename(entry, directory / entry.name)


def _files(how: Layout, directory: Path, slot: Slot, images: int) -> Iterator[tuple[str, bytes]]:
    """Yields the names and the contents of a prompt's images."""
    if not how.is_tiled:
        for index in range(images):
            yield _read_first(directory, how.names(slot, index, images))
        return
    name, content = _read_first(directory, how.names(slot, 0, images))
    grid = Image.fromarray(decode(content))
    side = grid.width // 2
    if grid.size != (2 * side, 2 * side):
        raise InputError(
            f"{directory / name} is {grid.width}x{grid.height} pixels, not a 2x2 grid of squares; "
            "export it again"
        )
    for index in range(images):  # the order in which compute_dpg_bench.py cuts it
        left, top = index % 2 * side, index // 2 * side
        tile = grid.crop((left, top, left + side, top + side))
        yield f"{name}#{index}", encoded(tile, "png")


def _is_there(directory: Path, names: tuple[str, ...]) -> bool:
    return any((directory / name).exists() for name in names)


def _read_first(directory: Path, names: tuple[str, ...]) -> tuple[str, bytes]:
    """Reads the first file that exists, which must be an image; returns its name and content."""
    name = next((name for name in names if (directory / name).exists()), names[0])
    try:
        with (directory / name).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"the file has more than {MAX_FILE_BYTES // 2**20} MiB")
        decode(content)
    except FileNotFoundError:
        raise InputError(f"{directory / name} is missing") from None
    except (OSError, ValueError) as problem:
        raise InputError(f"{directory / name}: {problem}") from None
    return name, content


def _check_prompt(directory: Path, slot: Slot) -> None:
    """Rejects a GenEval folder whose prompt is not the benchmark's prompt at that position."""
    path = directory / f"{slot.position:05d}" / "metadata.jsonl"
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(MAX_ROW_BYTES))["prompt"]
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        raise InputError(f"{path} is not a JSON object with a prompt") from None
    if said != slot.prompt.text:
        raise InputError(
            f"{path} does not have the benchmark's prompt, {checks.shown(slot.prompt.text)}"
        )
