"""Writes a dataset's gallery for the browser: thumbnails, search, and each image's settings.

The gallery needs no server. A page that is opened from disk may load scripts but not read files, so
the records are small scripts, and the page treats everything in them as text. All other files are
in a folder with a unique name, which `index.html` contains. As `index.html` is written last, a
reader sees the old gallery or the new one, never a partial one.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

from PIL import Image

from jaxdiff.checks import MAX_SIDE_PX
from jaxdiff.dataset import formats
from jaxdiff.dataset.finished import reader
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.dataset.settings import Settings
from jaxdiff.dataset.store import local
from jaxdiff.errors import InputError
from jaxdiff.images import image_files, loading
from jaxdiff.request import FIELDS, IMAGE_COLUMNS, LATER_COLUMNS, Options, from_columns

ASSETS = Path(__file__).parents[2] / "assets" / "gallery"
INDEX = "index.html"
GENERATOR = '<meta name="generator" content="jaxdiff view">'
FILES = re.compile(r"files-[0-9a-f]{8}")  # the folder that INDEX names, new each time
THUMBNAIL_PX = 384  # the longer side; smaller images are their own thumbnails
CHUNK_IMAGES, CHUNK_CHARACTERS = 2000, 2**20  # the page searches again after each
WAITING_IMAGES = 16  # read, but not written yet
# The fields of an image, in the order in which its record is written.
COLUMNS = (
    *("key", "id", "image_index", *FIELDS),
    *("metadata", "sha256", "pixel_sha256", "error"),
)
# Only where rows bring images; `source_files` lists the folders that have a file for the image.
SOURCE_COLUMNS = (*IMAGE_COLUMNS, "source_files")
# The job's settings that determine an image's file, along with its own.
MODELS = ("model", "variant", "refiner", "base", "upscale")
ALWAYS_SAID = ("noise", "dtype", "batch_size")
DECISIVE = dict.fromkeys((*ALWAYS_SAID, "image_format", *(field.name for field in fields(Options))))


def write(where: str | Path, target: Path | None = None) -> Path:
    """Writes the gallery of a dataset, finished or not; replaces an existing gallery.

    Args:
      target: the gallery's folder; by default "gallery" in the dataset's folder, which must be
        local then.

    Returns:
      The path of its `index.html`.

    Raises:
      InputError: if there is no dataset, if one of its files is damaged, or if `target` contains
        something other than a gallery.
    """
    run = open_run(where)
    target = target or local(where, "a gallery without --output").path("gallery")
    with _held(target):
        folder = target / f"files-{uuid.uuid4().hex[:8]}"
        try:
            _fill(folder, run)
            index = (ASSETS / INDEX).read_text("utf-8").replace("FILES", folder.name)
            (folder / INDEX).write_text(index, "utf-8")
            os.replace(folder / INDEX, target / INDEX)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for path in target.iterdir():
            if FILES.fullmatch(path.name) and path.name != folder.name:
                shutil.rmtree(path, ignore_errors=True)
    return target / INDEX


@contextlib.contextmanager
def _held(target: Path) -> Iterator[None]:
    """Creates the gallery's folder and locks it for this process; removes it if it is empty."""
    if target.is_symlink():  # perhaps part of a downloaded dataset
        raise InputError(f"{target} is a symbolic link; name a folder with --output")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{target} is a file; name a folder with --output") from None
    _check_ours(target)
    lock = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"{target}: another `jaxdiff view` is writing here; wait for it") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            target.rmdir()
        os.close(lock)


def _check_ours(target: Path) -> None:
    index = target / INDEX
    if index.is_file() and GENERATOR in index.read_text("utf-8", "replace"):
        return
    if any(not FILES.fullmatch(path.name) for path in target.iterdir()):
        raise InputError(f"{target} holds other files; name a new folder with --output")


def _fill(folder: Path, run: Run) -> None:
    """Writes all files that `index.html` needs, in constant memory."""
    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns(INDEX))
    columns = _columns(run.plan)
    counts = {"made": 0, "failed": 0}
    chunks = _Chunks(folder / "data")
    waiting = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL
        for row, image in reader.images(run):
            counts["failed" if image is None else "made"] += 1
            waiting.append(pool.submit(_store, folder, row, image, run.plan))
            if len(waiting) == WAITING_IMAGES:
                chunks.add(_record(waiting.popleft().result(), columns))
        for stored in waiting:
            chunks.add(_record(stored.result(), columns))
    chunks.close()
    job = _job(run) | counts | {"chunks": chunks.count}
    _write_script(folder / "data" / "job.js", "open", job)


def _columns(plan: Plan) -> tuple[str, ...]:
    columns = (*COLUMNS, *SOURCE_COLUMNS) if plan.takes_images else COLUMNS
    missing = {*LATER_COLUMNS} - {*plan.later_columns}
    return tuple(name for name in columns if name not in missing)


def _record(row: dict, columns: tuple[str, ...]) -> list:
    return [row[name] for name in columns]


class _Chunks:
    """Writes records to scripts of `CHUNK_IMAGES` at most, which a browser loads in turn."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.count = 0
        self._folder = folder
        self._rows: list[list] = []
        self._characters = 0

    def add(self, row: list) -> None:
        self._rows.append(row)
        self._characters += sum(len(value) for value in row if isinstance(value, str))
        if len(self._rows) == CHUNK_IMAGES or self._characters > CHUNK_CHARACTERS:
            self.close()

    def close(self) -> None:
        if self._rows:
            _write_script(self._folder / f"{self.count:05d}.js", "add", self._rows)
            self.count += 1
        self._rows, self._characters = [], 0


def _write_script(path: Path, function: str, value: list | dict) -> None:
    # In ASCII, and without "<", so that nothing can start or end an HTML element.
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(f"gallery.{function}({text});\n", "ascii")


def _job(run: Run) -> dict:
    """Returns the data that all images share."""
    settings = run.plan.settings
    return {
        "name": Path(run.address).resolve().name,
        "planned": run.plan.images,
        "columns": _columns(run.plan),
        "extension": image_files.EXTENSIONS[settings.image_format],
        "thumbnail_px": THUMBNAIL_PX,
        "upscales": run.plan.upscales or 1,
        "aspect": settings.width / settings.height,
        "shared": {
            "model": run.plan.model_name,
            "noise": settings.noise,
            "dtype": settings.dtype,
            "options": run.plan.options,
        },
        "fingerprint": run.plan.identity["model"],
        **_options(run.plan),
    }


def _options(plan: Plan) -> dict[str, str | None]:
    """Returns the options of `jaxdiff generate` that determine the files, for a POSIX shell.

    Each option is one word with its value, so that no value can be mistaken for an option. But
    a terminal obeys control characters in pasted text even between quotes, and a dataset's plan may
    contain any. So if a value has one, there are no `options`, and `unprintable` names its option.
    """
    settings = plan.settings
    said = {name: plan.models.get(name) for name in MODELS}
    for name in DECISIVE:
        value = getattr(settings, name)
        if name in ALWAYS_SAID or value != getattr(Settings, name):
            said[name] = value
    if plan.takes_images:
        said["image_root"] = plan.image_root
    words = [(name, value) for name, value in said.items() if value is not None]
    for name in ("lora", "controlnet", "ip_adapter"):
        words += [(name, file) for file in plan.models.get(name, ())]
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in words]
    unprintable = next((name for name, value in words if not value.isprintable()), None)
    options = shlex.join(f"{name}={value}" for name, value in words)
    return {"options": None if unprintable else options, "unprintable": unprintable}


def _store(folder: Path, row: dict, image: bytes | None, plan: Plan) -> dict:
    """Writes the files of one image; returns its row with its number of `source_files`."""
    if image is not None:
        _store_image(folder, row, image, image_files.EXTENSIONS[plan.settings.image_format])
    pictures = _sources(row, plan) if plan.takes_images else {}
    for name, picture in pictures.items():
        lossless = max(picture.size) <= THUMBNAIL_PX
        _write_webp(folder / name, row["key"], _thumbnail(picture), lossless=lossless)
    return row | {"source_files": [*pictures]}


def _store_image(folder: Path, row: dict, image: bytes, extension: str) -> None:
    """Writes an image unchanged, and its thumbnail if it is larger than one."""
    key = row["key"]
    path = folder / "images" / key[:6] / f"{key}.{extension}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    sides = (row.get(name) or 0 for name in (*formats.UPSCALED, "width", "height"))
    if max(sides) <= THUMBNAIL_PX:
        return
    try:
        with Image.open(io.BytesIO(image), formats=list(image_files.EXTENSIONS)) as opened:
            thumbnail = _thumbnail(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise InputError(f"image {key} is damaged ({problem})") from None
    _write_webp(folder / "thumbnails", key, thumbnail)


def _sources(row: dict, plan: Plan) -> dict[str, Image.Image]:
    """Returns the images that a row brought, in the image's size, by the folder for them.

    There are none if one of the files is gone, has changed or is not on this machine: datasets may
    be anybody's, and nothing is fetched because of them.
    """
    if max(row["width"], row["height"]) > MAX_SIDE_PX:
        return {}
    root = plan.image_root
    try:
        said = {*FIELDS, *IMAGE_COLUMNS} & row.keys()
        request = from_columns({name: row[name] for name in said})
        several = (*(request.control_image or ()), *(request.ip_adapter_image or ()))
        named = (request.image, request.mask_image, *several)
        if any("://" in said for said in (root, *(each.address for each in named if each))):
            return {}
        brought = loading.prepared(request, root, plan.settings.preprocess, enlarges=plan.enlarges)
    except (ImportError, InputError, ValueError):  # the first without OpenCV
        return {}
    pictures = {"sources": brought.image, "masks": brought.mask_image}
    for name, images in (
        ("controls", brought.control_image),
        ("prompts", brought.ip_adapter_image),
    ):
        pictures |= {f"{name}-{number}": pixels for number, pixels in enumerate(images or ())}
    return {
        folder: Image.fromarray(pixels).convert("RGB")
        for folder, pixels in pictures.items()
        if pixels is not None
    }


def _thumbnail(image: Image.Image) -> Image.Image:
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), reducing_gap=2.0)
    return image.convert("RGB")


def _write_webp(folder: Path, key: str, picture: Image.Image, *, lossless: bool = False) -> None:
    path = folder / key[:6] / f"{key}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "webp", quality=85, method=2, lossless=lossless)
