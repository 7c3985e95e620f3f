"""GAN upscalers, such as Real-ESRGAN: one network makes an image larger in one evaluation.

See Wang et al., 2018, arXiv:1809.00219, and Wang et al., 2021, arXiv:2107.10833. They see no text
and draw no noise. Imports no JAX.
"""

from types import MappingProxyType

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.upscaler import COMPACT, COMPONENT, NETWORK, RRDB
from jaxdiff.errors import InputError
from jaxdiff.families.family import UNGUIDED, Family
from jaxdiff.families.image_inputs import EDITS
from jaxdiff.request import NOT_SAMPLED

DEFAULT_SIDE = 256  # of an image to enlarge, if nothing names one
# How many times the height and width of what the network sees are doubled before a layer.
DOUBLED = {"conv_up1": 1, "conv_up2": 2, "conv_hr": 2, "conv_last": 2}


class Defaults:
    """An upscaler's properties; see `family.Defaults`."""

    base_needed = False
    latents = scheduler = MappingProxyType({})
    latent_channels = 3
    steps = 1
    guidance_scale = 1.0
    guidance = UNGUIDED
    sampler = NOT_SAMPLED
    tokens = 0
    largest_side = checks.MAX_SIDE_PX

    def __init__(self, checkpoint: Checkpoint):
        config = checkpoint.config(NETWORK)
        self.name = f"{config['_class_name']} upscaler"
        self.factor = self.size_multiple = config["scale"]
        self.size = (DEFAULT_SIDE * self.factor, DEFAULT_SIDE * self.factor)


def _operations(checkpoint: Checkpoint, height: int, width: int, tokens: int) -> tuple[int, int]:
    scale = checkpoint.config(NETWORK)["scale"]
    is_rrdb = checkpoint.config(NETWORK)["_class_name"] == RRDB
    squeezed = 4 // scale if is_rrdb else 1  # what the network sees is smaller by this
    total = 0
    for key, tensor in checkpoint.weights(NETWORK).items():
        if len(tensor.shape) == 4:
            doubled = DOUBLED.get(key.partition(".")[0], 0) if is_rrdb else 0
            total += 2 * tensor.size * (height * width * 4**doubled // squeezed**2)
    return total, total


def _no_tokenizer(text_encoder: str, *_):
    raise InputError(f"an upscaler has no {text_encoder}; leave it out")


def _networks():
    from jaxdiff.families import upscaler_model

    return upscaler_model


UPSCALER = Family(
    components={NETWORK: COMPONENT},
    defaults=Defaults,
    schedule=lambda config, bucket: None,
    operations=_operations,
    decoder_operations=lambda checkpoint, height, width: 0,
    tokenizer=_no_tokenizer,
    image_inputs=lambda checkpoint: EDITS._replace(enlarges=checkpoint.config(NETWORK)["scale"]),
    networks=_networks,
)
UPSCALERS = {RRDB: UPSCALER, COMPACT: UPSCALER}
