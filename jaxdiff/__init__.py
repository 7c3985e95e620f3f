"""Batch text-to-image generation in JAX: prompt manifests in, verifiable image datasets out."""

import logging
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING

from jaxdiff.errors import InputError, UnfinishedError
from jaxdiff.request import Request

if TYPE_CHECKING:
    from jaxdiff.engine.engine import TextToImage, load
    from jaxdiff.engine.image import Image
    from pipelines.make_dataset import MadeDataset, make_dataset

__all__ = [
    "Image",
    "InputError",
    "MadeDataset",
    "Request",
    "TextToImage",
    "UnfinishedError",
    "load",
    "make_dataset",
]

# Imported on demand, so that jaxdiff.dataset can be used on a machine without JAX.
_LATE = {
    "Image": "jaxdiff.engine.image",
    "MadeDataset": "pipelines.make_dataset",
    "TextToImage": "jaxdiff.engine.engine",
    "load": "jaxdiff.engine.engine",
    "make_dataset": "pipelines.make_dataset",
}


def __getattr__(name: str):
    if name == "__version__":
        try:
            return metadata.version("jaxdiff")
        except metadata.PackageNotFoundError:
            return "(a checkout that is not installed)"
    if name in _LATE:
        return getattr(_imported(_LATE[name]), name)
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")


def _imported(module: str) -> ModuleType:
    """Imports a module without Beam's warning that Google's libraries are not installed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return import_module(module)
    finally:
        logging.disable(level)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
