"""The networks of GAN upscalers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from jax import Array

from jaxdiff.checkpoint.upscaler import NETWORK, RRDB
from jaxdiff.families.model import Params
from jaxdiff.models import rrdb, srvgg
from jaxdiff.weights.network import Network


class UpscalerModel(NamedTuple):
    """What a checkpoint of an upscaler contains, in the place of `model.Model`.

    Attributes:
      networks: its only network, as `NETWORK`.
      scale: by how much it multiplies the sides of an image.
      enlarge: maps (params, images in 0..1 [b, h, w, 3]) to [b, scale h, scale w, 3], not clipped.
    """

    networks: Mapping[str, Network]
    scale: int
    enlarge: Callable[[Params, Array], Array]


def read_configs(parsed: Mapping[str, dict]) -> dict:
    """Returns the config dataclass of the network; see `family.Networks`."""
    values = dict(parsed[NETWORK])
    config = rrdb.RRDBNetConfig if values.pop("_class_name") == RRDB else srvgg.SRVGGNetConfig
    return {NETWORK: config(**values)}


def check_counts(configs: Mapping, weights: Mapping) -> None:
    """Does nothing: the config was read from the weights."""


def module(component: str, config: Any) -> type[nnx.Module]:
    """Returns the Flax module's class; see `family.Networks`."""
    is_rrdb = isinstance(config, rrdb.RRDBNetConfig)
    return rrdb.RRDBNet if is_rrdb else srvgg.SRVGGNetCompact


def build(configs: Mapping, index: Mapping) -> UpscalerModel:
    """Builds the network; see `family.Networks`."""
    config = configs[NETWORK]
    sharding = rrdb.SHARDING if isinstance(config, rrdb.RRDBNetConfig) else srvgg.SHARDING
    network = Network(module(NETWORK, config), config, sharding)
    return UpscalerModel(
        {NETWORK: network}, config.scale, lambda params, images: network(params)(images)
    )
