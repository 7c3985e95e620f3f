"""Batch text-to-image generation in JAX: prompt manifests in, verifiable image datasets out."""

from typing import TYPE_CHECKING

from jaxdiff.request import Request

if TYPE_CHECKING:
    from jaxdiff.engine.engine import TextToImage, load

__all__ = ["Request", "TextToImage", "load"]


def __getattr__(name: str):
    # Imported on demand, so that jaxdiff.dataset can be used on a machine without JAX.
    if name in ("TextToImage", "load"):
        from jaxdiff.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")
