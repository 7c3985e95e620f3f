"""Upscalers that tests make: real architectures, small, random weights."""

from pathlib import Path

from random_weights import random_params

from jaxdiff.models.rrdb import RRDBNet, RRDBNetConfig
from jaxdiff.models.srvgg import SRVGGNetCompact, SRVGGNetConfig
from jaxdiff.weights.save import save_params


def write_rrdb(path: Path, scale: int = 4, seed: int = 0) -> Path:
    """Writes an RRDBNet of 0.1 million weights."""
    config = RRDBNetConfig(features=8, growth=4, blocks=2, scale=scale)
    save_params(random_params(RRDBNet, config, seed), path, "float32")
    return path


def write_srvgg(path: Path, scale: int = 2, seed: int = 0) -> Path:
    """Writes a SRVGGNetCompact of 3,000 weights."""
    config = SRVGGNetConfig(features=8, convs=2, scale=scale)
    save_params(random_params(SRVGGNetCompact, config, seed), path, "float32")
    return path
