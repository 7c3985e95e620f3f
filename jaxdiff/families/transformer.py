"""What the pages of the transformer families share. Imports no JAX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.lora_keys import original_layers
from jaxdiff.checkpoint.lora_names import Layer
from jaxdiff.checkpoint.original.naming import Table
from jaxdiff.families import unet_operations
from jaxdiff.families.family import CLASSIFIER_FREE


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """A checkpoint's properties and default settings; see `family.Defaults`."""

    name: str
    size: tuple[int, int]
    size_multiple: int
    largest_side: int = checks.MAX_SIDE_PX
    factor: int
    latent_channels: int
    latents: Mapping[str, Any]
    steps: int
    guidance_scale: float
    sampler: str
    guidance: str = CLASSIFIER_FREE
    tokens: int
    scheduler: dict = field(repr=False)
    base_needed: bool = False


def kohya_names(
    tables: Sequence[Table], checkpoint: Checkpoint, component: str
) -> dict[str, Layer]:
    """Returns the transformer's layers by their keys in tables; see `Family.kohya_names`."""
    return original_layers(tables, checkpoint, component) if component == "transformer" else {}


def kl_decoder_operations(checkpoint: Checkpoint, height: int, width: int) -> int:
    """Counts the operations of an `AutoencoderKL`'s decoder; see `Family.decoder_operations`."""
    decoder = {
        key.removeprefix("decoder."): tensor
        for key, tensor in checkpoint.weights("vae").items()
        if key.startswith(("decoder.", "post_quant_conv."))
    }
    return unet_operations.of_network(decoder, height, width)
