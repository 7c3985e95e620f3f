"""The layout of each benchmark's image folder: file names, additional files, restrictions.

All of it follows the source code of the benchmarks' own scorers.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.evaluation.benchmarks import STYLES
from jaxdiff.evaluation.records import Prompt
from jaxdiff.images.image_files import SAVE, decode

MAX_NAME_BYTES = 255  # limit of common file systems
GRID_IMAGES = 16  # at most, in a GenEval prompt's overview
RESULTS = "results.csv"
TABLE = ("file", "id", "prompt", "category", "index")  # the first columns of RESULTS
# Spreadsheets may run a cell that starts like this as a formula, with links and commands in it
# (OWASP, CSV Injection). The last four are the first four in full width.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
TILES = ".tiles"
SAVE_JPEG = SAVE["jpeg"] | {"comment": b"JPEG quality 95, 4:4:4"}  # HPSv2 allows no other file


@dataclass(frozen=True)
class Slot:
    """A prompt's position in a benchmark.

    Attributes:
      position: among all prompts, from 0.
      of_category: among the prompts of its category, from 0.
    """

    prompt: Prompt
    position: int
    of_category: int


@dataclass(frozen=True)
class Layout:
    """How a benchmark's images are arranged in their folder.

    Attributes:
      names: returns the possible paths of a prompt's image: (slot, index, images). Images are
        written to the first path.
      extension: of the files, "png" or "jpg".
      images: the number of images per prompt, if it is fixed.
      check: raises BadValueError for a prompt that the layout cannot name.
      finish: runs when all images of a prompt are written: (folder, slot, files).
      close: runs when all images are written: (folder, slots, images).
      is_tiled: whether a file is a 2x2 grid of a prompt's images, squares of one size. They are
        kept in the folder `TILES` until the grid is complete.
    """

    names: Callable[[Slot, int, int], tuple[str, ...]]
    extension: str = "png"
    images: int | None = None
    check: Callable[[Prompt], None] = lambda prompt: None
    finish: Callable[[Path, Slot, list[Path]], None] = lambda folder, slot, files: None
    close: Callable[[Path, Sequence[Slot], int], None] = lambda folder, slots, images: None
    is_tiled: bool = False


def encoded(image: Image.Image, extension: str) -> bytes:
    """Encodes an image as "png" or "jpg" (quality 95)."""
    file = io.BytesIO()
    if extension == "png":
        image.save(file, "png")
    else:
        image.save(file, "jpeg", **SAVE_JPEG)
    return file.getvalue()


def _of_geneval(slot: Slot, index: int, _images: int) -> tuple[str, ...]:
    samples = f"{slot.position:05d}/samples"
    return f"{samples}/{index:04d}.png", f"{samples}/{index:05d}.png"  # the generator's names


def _of_t2i_compbench(slot: Slot, index: int, images: int) -> tuple[str, ...]:
    number = slot.of_category * images + index
    name = f"samples/{slot.prompt.text}_{number:06d}.png"
    return (f"{slot.prompt.category}/{name}" if slot.prompt.category else name,)


def _of_categories(slot: Slot, index: int, _images: int) -> tuple[str, ...]:
    """Returns a path that is valid for any category; results.csv has the category itself."""
    folder = re.sub(r"[^\w &',+()-]", "-", slot.prompt.category.strip(" ."))
    folder = folder.encode()[:200].decode(errors="ignore")
    name = f"{slot.position:05d}-{index}.png" if index else f"{slot.position:05d}.png"
    return (f"{folder}/{name}" if folder else name,)


def _check_geneval(prompt: Prompt) -> None:
    missing = [name for name in ("tag", "include", "prompt") if name not in prompt.row]
    if missing:
        raise BadValueError(f"its row lacks {', '.join(missing)}, which GenEval's scorer needs")


def _check_t2i_compbench(prompt: Prompt) -> None:
    """Rejects "_" in a prompt: BLIP_vqa.py reads the prompt from the name, up to the first "_"."""
    if "_" in prompt.text:
        raise BadValueError('the scorer would cut the prompt at the first "_"')
    _check_name(prompt.text, f"{prompt.text}_000000.png")
    if prompt.category:
        _check_name(prompt.category, prompt.category)


def _check_dpg(prompt: Prompt) -> None:
    if "." in prompt.id:
        raise BadValueError('the scorer would cut the id at the first "."')
    _check_name(prompt.id, f"{prompt.id}.png")


def _check_hpsv2(prompt: Prompt) -> None:
    checks.choice("its style", prompt.category, STYLES)


def _check_name(said: str, name: str) -> None:
    """Rejects an invalid file name, or one that is a path to another folder."""
    if not said or {"/", "\\", "\0"} & set(said) or name in (".", ".."):
        raise BadValueError(f"{checks.shown(said)} cannot be a file name")
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise BadValueError(f"{checks.shown(said)} is too long for a file name")


def _finish_geneval(folder: Path, slot: Slot, files: list[Path]) -> None:
    own = folder / f"{slot.position:05d}"
    (own / "metadata.jsonl").write_text(json.dumps(slot.prompt.row))  # exactly one line
    shown = files[:GRID_IMAGES]
    (own / "grid.png").write_bytes(encoded(_grid(shown, math.isqrt(len(shown) - 1) + 1), "png"))


def _finish_dpg(folder: Path, slot: Slot, files: list[Path]) -> None:
    (folder / f"{slot.prompt.id}.png").write_bytes(encoded(_grid(files, 2), "png"))
    for file in files:
        file.unlink()


def _grid(files: list[Path], columns: int) -> Image.Image:
    """Arranges images in rows from the top, smaller ones at the top left of their cells."""
    images = [Image.fromarray(decode(file.read_bytes())) for file in files]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    whole = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for place, image in enumerate(images):
        whole.paste(image, (place % columns * width, place // columns * height))
    return whole


def _close_categories(folder: Path, slots: Sequence[Slot], images: int) -> None:
    """Writes the table of files, for spreadsheets; no scorer reads it, and neither does jaxdiff."""
    first = slots[0].prompt
    others = [name for name in first.row if name.casefold() not in ("prompt", "prompts", *TABLE)]
    with (folder / RESULTS).open("w", encoding="utf-8", newline="") as file:
        # Text is always quoted: otherwise a lone carriage return in it could begin a new row.
        table = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        table.writerow([*TABLE, *map(_cell, others)])
        for slot in slots:
            prompt = slot.prompt
            texts = [_cell(text) for text in (prompt.id, prompt.text, prompt.category)]
            extra = [_cell(prompt.row.get(name, "")) for name in others]
            for index in range(images):
                (name,) = _of_categories(slot, index, images)
                table.writerow([name, *texts, index, *extra])


def _cell(value):
    """Returns a value that no spreadsheet runs: text like a formula gets an apostrophe in front."""
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula else value


GENEVAL = Layout(_of_geneval, check=_check_geneval, finish=_finish_geneval)
T2I_COMPBENCH = Layout(_of_t2i_compbench, check=_check_t2i_compbench)
OF_CATEGORIES = Layout(_of_categories, close=_close_categories)
LAYOUTS = {
    "geneval": GENEVAL,
    "t2i-compbench": T2I_COMPBENCH,
    "dpg": Layout(
        lambda slot, index, images: (f"{slot.prompt.id}.png",),
        images=4,
        check=_check_dpg,
        finish=_finish_dpg,
        close=lambda folder, slots, images: (folder / TILES).rmdir(),
        is_tiled=True,
    ),
    "partiprompts": OF_CATEGORIES,
    "drawbench": OF_CATEGORIES,
    "hpsv2": Layout(
        lambda slot, index, images: (f"{slot.prompt.category}/{slot.of_category:05d}.jpg",),
        extension="jpg",
        images=1,
        check=_check_hpsv2,
    ),
    "prompts": OF_CATEGORIES,
}
