"""A manifest: one file, or several that are read one after the other.

A row that cannot be read is an entry with an error, never an exception: one bad row must not stop
the good ones. Only a file that cannot be read at all raises. What the values mean is `rows`'s part.
"""

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.dataset import paths
from jaxdiff.dataset.manifest.readers import READERS, Entry, read_item
from jaxdiff.errors import InputError

ITEM_ENDING = ".txt"  # of the files of a folder that hold one prompt each


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a manifest.

    Attributes:
      path: where its bytes lie.
      name: what people know it by: a path or an address. Its ending says how it is read.
      is_item: whether it is one prompt as a whole, whose id is the name without ".txt".
    """

    path: Path
    name: str
    is_item: bool = False


@dataclass(frozen=True)
class Manifest:
    """What `--manifest` names.

    Attributes:
      name: as it was said.
      sources: its files, in the order in which they are read: one at least.
    """

    name: str
    sources: tuple[Source, ...]


def find(where: str | Path) -> Manifest:
    """The manifest that is a file here, a folder of one-prompt text files, or a glob.

    Several files are read in the order of their names.

    Raises:
      InputError: if there is none, or of a file that cannot be read by its name.
    """
    path, name = Path(where), str(where)
    if path.is_file():
        return of_names(name, {name: path})
    if path.is_dir():
        items = {str(item): item for item in path.glob(f"*{ITEM_ENDING}") if item.is_file()}
        return of_names(name, items, are_items=True)
    found = glob.glob(name, recursive=True) if glob.has_magic(name) else []
    return of_names(name, {each: Path(each) for each in found if Path(each).is_file()})


def of_names(name: str, paths: dict[str, Path], are_items: bool = False) -> Manifest:
    """The manifest of the files that lie at these paths, by their names; raises InputError."""
    if not paths and are_items:
        raise InputError(f"manifest {name} is a folder without {ITEM_ENDING} files, a prompt each")
    if not paths and glob.has_magic(name):
        raise InputError(f"manifest {name} matches no file")
    if not paths:
        raise InputError(f"manifest {name} does not exist (or is no file)")
    sources = tuple(Source(paths[each], each, are_items) for each in sorted(paths))
    for source in sources:
        kind(source)
    return Manifest(name, sources)


def kind(source: Source) -> str:
    """The file type that the name's ending says, such as "csv" for `prompts.csv.gz`."""
    if source.is_item:
        return "item"
    suffixes = source.name.lower().removesuffix(".gz").rsplit("/", 1)[-1].rsplit(".", 1)
    if len(suffixes) == 2 and suffixes[1] in READERS:
        return suffixes[1]
    endings = ", ".join(f".{ending}" for ending in READERS)
    raise InputError(
        f"manifest {source.name}: the name must end in one of {endings} (or that and .gz)"
    )


def kinds(manifest: Manifest) -> str:
    """The file types of its files, such as "csv" or "csv, jsonl"."""
    return ", ".join(sorted({kind(source) for source in manifest.sources}))


def digest(manifest: Manifest) -> str:
    """SHA-256 (hex) of its file; of several, of the lines "SHA-256  name" of each in its folder."""
    sources = manifest.sources
    if len(sources) == 1 and not sources[0].is_item:
        return paths.digest(sources[0].path)
    whole = hashlib.sha256()
    for source in sources:
        name = source.name.rsplit("/", 1)[-1].encode("utf-8", "surrogateescape")
        whole.update(paths.digest(source.path).encode() + b"  " + name + b"\n")
    return whole.hexdigest()


def read(source: Source, prompt_column: str | None = None) -> Iterator[Entry]:
    """Yields the rows of one file, blank lines too, in constant memory.

    Args:
      prompt_column: the column of the prompts, where it is not to be found by its name.

    Raises:
      InputError: for a damaged file, or a table that has no column of prompts.
    """
    if source.is_item:
        name = Path(source.name).name.removesuffix(ITEM_ENDING)
        return read_item(source.path, name, prompt_column)
    reader = READERS[kind(source)]
    return reader(source.path, source.name, prompt_column)
