"""A manifest: one file, or several that are read one after the other.

A row that cannot be read is an entry with an error, not an exception: one bad row must not stop the
others. Only a file that cannot be read at all raises. `rows` interprets the values.
"""

import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.checks import BadValueError
from jaxdiff.dataset import paths
from jaxdiff.dataset.manifest.parquet import Inside
from jaxdiff.dataset.manifest.readers import IMAGE_ENDINGS, READERS, Entry, read_item
from jaxdiff.dataset.names import DATA, WORK
from jaxdiff.errors import InputError
from jaxdiff.images import archives
from jaxdiff.images import sources as images

ITEM_ENDING = ".txt"  # of files with one prompt each, in a folder
OUR_ENDINGS = (archives.ENDING, ".parquet")  # of shards
IMAGEFOLDER = "metadata.jsonl"  # lists the files of an imagefolder


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a manifest.

    Attributes:
      path: of its bytes on disk.
      name: its path or address in messages; its ending determines how it is read.
      is_item: whether the whole file is one prompt, whose id is the name without ".txt".
    """

    path: Path
    name: str
    is_item: bool = False


@dataclass(frozen=True)
class Manifest:
    """The files that `--manifest` names.

    Attributes:
      name: as the user gave it.
      sources: its files, at least one, in the order in which they are read.
    """

    name: str
    sources: tuple[Source, ...]


def find(where: str | Path) -> Manifest:
    """Finds a manifest: a local file, a glob, a folder of text files or images, or a dataset.

    A dataset is one that `jaxdiff generate` made as WebDataset or Parquet, another folder of tar
    archives, or an imagefolder. Several files are read in the order of their names.

    Raises:
      InputError: if there is none, or a file name has an unknown ending.
    """
    path, name = Path(where), str(where)
    if path.is_file():
        return of_names(name, {name: path})
    if path.is_dir() and (lists := _of_images(path)):
        return of_names(name, {str(each): each for each in lists})
    if path.is_dir():
        found = (item for item in path.glob(f"*{ITEM_ENDING}") if item.is_file())
        # Hidden files are not prompts: macOS leaves "._NAME.txt" beside each file it copies.
        items = {str(item): item for item in found if not item.name.startswith(".")}
        if not items and (pictures := _pictures(path)):
            return of_names(name, {str(each): each for each in pictures})
        return of_names(name, items, are_items=True)
    found = glob.glob(name, recursive=True) if glob.has_magic(name) else []
    return of_names(name, {each: Path(each) for each in found if Path(each).is_file()})


def _of_images(folder: Path) -> list[Path]:
    """Returns the files that list the images of a dataset; raises InputError if it has none."""
    if (folder / IMAGEFOLDER).is_file():
        return [folder / IMAGEFOLDER]
    if (folder / WORK).is_dir():
        found = [each for ending in OUR_ENDINGS for each in (folder / DATA).glob(f"*{ending}")]
        if not found:
            raise InputError(
                f"manifest {folder} is a dataset without WebDataset or Parquet shards; if it is an "
                f"imagefolder, name its images, in quotes: '{folder}/{DATA}/*/*.png'"
            )
        return found
    return [*folder.glob(f"*{archives.ENDING}")]


def _pictures(folder: Path) -> list[Path]:
    """Returns the image files of a folder without prompts."""
    endings = tuple(f".{ending}" for ending in IMAGE_ENDINGS)
    found = (each for each in folder.iterdir() if each.name.lower().endswith(endings))
    return [each for each in found if each.is_file() and not each.name.startswith(".")]


def of_names(name: str, paths: dict[str, Path], are_items: bool = False) -> Manifest:
    """Returns the manifest of files given as paths by name; raises InputError like `find`."""
    if not paths and are_items:
        raise InputError(f"manifest {name} is a folder without {ITEM_ENDING} files or images")
    if not paths and glob.has_magic(name):
        raise InputError(f"manifest {name} matches no file")
    if not paths:
        raise InputError(f"manifest {name} does not exist or is not a file")
    sources = tuple(Source(paths[each], each, are_items) for each in sorted(paths))
    for source in sources:
        kind(source)
    return Manifest(name, sources)


def kind(source: Source) -> str:
    """Returns the file type by the name's ending, for instance "csv" for `prompts.csv.gz`."""
    if source.is_item:
        return "item"
    suffixes = source.name.lower().removesuffix(".gz").rsplit("/", 1)[-1].rsplit(".", 1)
    if len(suffixes) == 2 and suffixes[1] in READERS:
        return suffixes[1]
    endings = ", ".join(f".{ending}" for ending in READERS)
    raise InputError(
        f"manifest {source.name}: the name must end in one of {endings} (.gz may follow)"
    )


def kinds(manifest: Manifest) -> str:
    """Returns the types of its files, for instance "csv" or "csv, jsonl"."""
    return ", ".join(sorted({kind(source) for source in manifest.sources}))


def digest(manifest: Manifest) -> str:
    """Returns the SHA-256 (hex) of its file, or of the lines "SHA-256  name" of several files."""
    sources = manifest.sources
    if len(sources) == 1 and not sources[0].is_item:
        return paths.digest(sources[0].path)
    whole = hashlib.sha256()
    for source in sources:
        name = source.name.rsplit("/", 1)[-1].encode("utf-8", "surrogateescape")
        whole.update(paths.digest(source.path).encode() + b"  " + name + b"\n")
    return whole.hexdigest()


def read(
    source: Source, prompt_column: str | None = None, root: str | None = None
) -> Iterator[Entry]:
    """Yields the rows of one file, including blank lines, in constant memory.

    Args:
      prompt_column: the name of the prompt column, if the user has given it.
      root: what addresses of images are relative to, a folder or URL; None for the file's folder.

    Raises:
      InputError: for a damaged file, a table without a prompt column, or a file with images that
        cannot be read in it later.
    """
    if source.is_item:
        name = Path(source.name).name.removesuffix(ITEM_ENDING)
        return read_item(source.path, name, prompt_column)
    reader = READERS[kind(source)]
    entries = reader(source.path, source.name, prompt_column)
    if Path(source.name).name == IMAGEFOLDER:
        return map(_with_image, entries)
    if kind(source) in ("parquet", "tar", *IMAGE_ENDINGS):
        place = functools.cache(functools.partial(_place, source, root))
        return (_with_addresses(entry, place) for entry in entries)
    return entries


def _place(source: Source, root: str | None) -> str:
    """Returns the address of a file with images; raises InputError if it cannot be used later."""
    if source.name.lower().endswith(".gz"):
        raise InputError(f"manifest {source.name} has images; unpack it with gunzip")
    if "://" in source.name:
        raise InputError(
            f"manifest {source.name} has images, which are read from this machine only; copy it "
            "here, and name the copy"
        )
    path, folder = os.path.abspath(source.path), root or os.path.dirname(source.path) or "."
    try:
        address = images.address(path, folder)
    except BadValueError:
        address = None
    if not address or not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"manifest {source.name} has images, but is not in {folder} or is a link to a place "
            "outside; move it there, or name its folder with --image-root"
        )
    return address


def _with_addresses(entry: Entry, place: Callable[[], str]) -> Entry:
    """Completes the addresses of images in the file itself."""

    def complete(value):
        if isinstance(value, Inside):
            return place() + (value.name and f"{archives.MARK}{value.name}")
        return value

    if entry.values is None:
        return entry
    values = {
        name: [*map(complete, value)] if isinstance(value, list) else complete(value)
        for name, value in entry.values.items()
    }
    if entry.values == {"image": Inside("")}:
        values["id"] = values["image"]
    return entry._replace(values=values)


def _with_image(entry: Entry) -> Entry:
    """Gives the column of an imagefolder's files the name that it has in manifests."""
    if entry.values is None or "image" in entry.values or "file_name" not in entry.values:
        return entry
    values = dict(entry.values)
    return entry._replace(values={"image": values.pop("file_name"), **values})
