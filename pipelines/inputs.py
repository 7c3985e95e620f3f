"""Remote manifests (gs://, s3://), copied to a local folder through Beam's file systems."""

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.errors import InputError

EXTRAS = {"gs": ("google.cloud.storage", "gcp"), "s3": ("boto3", "aws")}  # a module and its extra


@contextlib.contextmanager
def fetched(where: str, options: PipelineOptions) -> Iterator[Manifest]:
    """Yields the manifest at a path, glob or URL; its files are local until the context ends.

    Args:
      where: as for `manifest.find`, or the URL of a file, of a folder of text files with one prompt
        each, or of a glob.
      options: Beam's options, which may be needed to reach it.

    Raises:
      InputError: if it does not exist or cannot be read.
    """
    if "://" not in where:
        yield manifests.find(where)
        return
    with tempfile.TemporaryDirectory(prefix="jaxdiff-manifest-") as folder:
        yield _copied(where, Path(folder), options)


def _copied(where: str, folder: Path, options: PipelineOptions) -> Manifest:
    _check_extra(where)
    FileSystems.set_options(options)
    try:
        addresses, are_items = [] if where.endswith("/") else _match(where), False
        if not addresses:
            addresses = _match(f"{where.rstrip('/')}/*{manifests.ITEM_ENDING}")
            are_items = bool(addresses) or where.endswith("/")
        paths = {}
        for number, address in enumerate(sorted(addresses)):
            paths[address] = folder / f"{number}{'.gz' * address.lower().endswith('.gz')}"
            with (
                FileSystems.open(address, compression_type=CompressionTypes.UNCOMPRESSED) as source,
                paths[address].open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)
    except InputError:
        raise
    except Exception as problem:  # each client has its own types
        reason = " ".join(str(problem).split())[:300]
        raise InputError(f"manifest {where} cannot be read ({reason})") from problem
    return manifests.of_names(where, paths, are_items)


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
