"""The networks of transformer families at full size, split over the devices of a mesh: no torch.

For denoisers, see `denoisers.check_full_size`.
"""

import networks
import pytest
from published_autoencoders import FULL_DC, FULL_FLUX_2, FULL_QWEN_IMAGE  # beside this file
from published_encoders import (
    GEMMA2_2B,
    QWEN3_4B,
    QWEN3_8B,
    QWEN_IMAGE,
    T5_XXL_FLUX,
    UMT5_XXL,
)

from jaxdiff.models.qwen_image import QwenImageConfig

DEVICES = 4
GIGABYTE = 10**9
FULL_SIZE = {
    "T5-XXL": T5_XXL_FLUX,
    "UMT5-XXL": UMT5_XXL,
    "Qwen3-4B": QWEN3_4B,
    "Qwen3-8B": QWEN3_8B,
    "Qwen2.5-VL-7B": QWEN_IMAGE,
    "Gemma-2-2B": GEMMA2_2B,
    "Flux.2's autoencoder": FULL_FLUX_2 | {"_class_name": "AutoencoderKLFlux2"},
    "Qwen-Image's autoencoder": FULL_QWEN_IMAGE | {"_class_name": "AutoencoderKLQwenImage"},
    "Sana's autoencoder": FULL_DC | {"_class_name": "AutoencoderDC"},
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_rules_split_nearly_all_weights(name, record_property):
    whole, held = networks.shares(FULL_SIZE[name], DEVICES)
    copied = sum(size for key, size in whole.items() if held[key] == size)
    record_property("copied", copied / sum(whole.values()))
    assert copied <= 0.03 * sum(whole.values())


def test_each_of_four_devices_can_hold_qwen_images_networks():
    """In bfloat16, without activations: its denoiser alone would not fit one of 40 GB."""
    denoiser = QwenImageConfig().to_json()  # the defaults are the published model's
    sizes, held = {}, {}
    for name, config in (
        ("text encoder", QWEN_IMAGE),
        ("denoiser", denoiser),
        ("autoencoder", FULL_SIZE["Qwen-Image's autoencoder"]),
    ):
        every = networks.shares(config, DEVICES)
        sizes[name], held[name] = (2 * sum(each.values()) / GIGABYTE for each in every)
    assert sizes["denoiser"] == pytest.approx(40.9, abs=0.1)
    assert max(held.values()) == held["denoiser"] < 12
    assert sum(held.values()) < 14
