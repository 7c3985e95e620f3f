"""Batch text-to-image generation in JAX: prompt manifests in, verifiable image datasets out."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

from jaxdiff.errors import InputError
from jaxdiff.request import Request

if TYPE_CHECKING:
    from jaxdiff.engine.engine import TextToImage, load
    from jaxdiff.engine.image import Image

__all__ = ["Image", "InputError", "Request", "TextToImage", "load"]

# Imported on demand, so that jaxdiff.dataset can be used on a machine without JAX.
_LATE = {
    "Image": "jaxdiff.engine.image",
    "TextToImage": "jaxdiff.engine.engine",
    "load": "jaxdiff.engine.engine",
}


def __getattr__(name: str):
    if name == "__version__":
        try:
            return metadata.version("jaxdiff")
        except metadata.PackageNotFoundError:
            return "(a checkout that is not installed)"
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
