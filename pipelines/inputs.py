"""Manifests that are not local files: prompts of the command line, standard input, and URLs.

Each is copied to a temporary folder; URLs (gs://, s3://) through Beam's file systems.
"""

import contextlib
import glob
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.errors import InputError
from pipelines import jobs
from pipelines.generate_options import STANDARD_INPUT

EXTRAS = {"gs": ("google.cloud.storage", "gcp"), "s3": ("boto3", "aws")}  # a module and its extra


@contextlib.contextmanager
def fetched(
    where: str,
    options: PipelineOptions,
    *,
    content: Path | None = None,
    prompts: Sequence[str] = (),
) -> Iterator[Manifest]:
    """Yields a job's manifest; its files are local until the context ends.

    Args:
      where: as for `manifest.find`; "-" for standard input; or the URL of a file, of a folder of
        text files with one prompt each, or of a glob.
      options: Beam's options, which may be needed to reach it.
      content: the manifest's file; if it is given, `where` is only a name.
      prompts: the lines of a text manifest; if there are any, `where` is only a name.

    Raises:
      InputError: if it does not exist or cannot be read.
    """
    if content is not None:
        yield manifests.of_names(where, {where: content})
        return
    if not prompts and where != STANDARD_INPUT and "://" not in where:
        yield manifests.find(where)
        return
    with tempfile.TemporaryDirectory(prefix="jaxdiff-manifest-") as temporary:
        folder = Path(temporary)
        if prompts:
            lines = "".join(f"{line}\n" for line in prompts)
            (folder / "prompts").write_text(lines, "utf-8", "surrogateescape")
            yield manifests.of_names(where, {where: folder / "prompts"})
        elif where == STANDARD_INPUT:
            yield _read(folder / "stdin")
        else:
            yield _copied(where, folder, options)


@contextlib.contextmanager
def unreadable_named() -> Iterator[None]:
    """Raises InputError, with the file's name, where the operating system refuses to read one."""
    try:
        yield
    except OSError as problem:
        name = problem.filename or "the input"
        raise InputError(f"{name} cannot be read: {problem.strerror}") from None


def exists(where: str, options: PipelineOptions) -> bool:
    """Returns whether there is a file or a folder at a manifest's path, glob or URL.

    Raises:
      InputError: if the URL cannot be reached.
    """
    if where == STANDARD_INPUT:
        return True
    if "://" not in where:
        return Path(where).exists() or bool(glob.glob(where, recursive=True))
    with _file_system(where, options):
        addresses, _ = _found(where)
    return bool(addresses)


def _read(path: Path) -> Manifest:
    """Copies standard input to a path; recognises its format by its beginning."""
    if sys.stdin is None:
        raise InputError("--manifest -: there is no standard input; name a file")
    if sys.stdin.isatty():
        jobs.say("reading prompts, one per line, until Ctrl-D")
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
    with path.open("rb") as file:
        head = file.read(2**16)
    if b"\0" in head or head.startswith(b"\x1f\x8b"):
        raise InputError("--manifest -: standard input is not text; unpack it, or name its file")
    name = f"stdin.{_kind(head.decode('utf-8-sig', 'replace'))}"
    return manifests.of_names(name, {name: path})


def _kind(head: str) -> str:
    """Returns the file type of a text that begins like this."""
    first, *_ = head.lstrip().splitlines() or [""]
    if first.startswith("{"):
        return "jsonl"
    for kind, separator in (("csv", ","), ("tsv", "\t")):
        names = [name.strip(' "').casefold() for name in first.split(separator)]
        if len(names) > 1 and "prompt" in names:
            return kind
    return "txt"


def _copied(where: str, folder: Path, options: PipelineOptions) -> Manifest:
    with _file_system(where, options):
        addresses, are_items = _found(where)
        paths = {}
        for number, address in enumerate(sorted(addresses)):
            paths[address] = folder / f"{number}{'.gz' * address.lower().endswith('.gz')}"
            with (
                FileSystems.open(address, compression_type=CompressionTypes.UNCOMPRESSED) as source,
                paths[address].open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)
    return manifests.of_names(where, paths, are_items)


@contextlib.contextmanager
def _file_system(where: str, options: PipelineOptions) -> Iterator[None]:
    """Prepares Beam's file system for a URL; names the URL in its errors."""
    _check_extra(where)
    FileSystems.set_options(options)
    try:
        yield
    except Exception as problem:  # each client has its own types
        reason = " ".join(str(problem).split())[:300]
        raise InputError(f"manifest {where} cannot be read ({reason})") from problem


def _found(where: str) -> tuple[list[str], bool]:
    """Returns the addresses of a URL's files, and whether they are a folder's text files."""
    addresses = [] if where.endswith("/") else _match(where)
    if addresses:
        return addresses, False
    addresses = _match(f"{where.rstrip('/')}/*{manifests.ITEM_ENDING}")
    return addresses, bool(addresses) or where.endswith("/")


def _match(pattern: str) -> list[str]:
    (result,) = FileSystems.match([pattern])
    return [found.path for found in result.metadata_list if not found.path.endswith("/")]


def _check_extra(where: str) -> None:
    module, extra = EXTRAS.get(where.partition("://")[0], (None, None))
    try:
        missing = module and importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the parent package is missing
        missing = True
    if missing:
        raise InputError(f"manifest {where} needs: pip install 'apache-beam[{extra}]'")
