"""With the same random weights, each network gives the output of diffusers or transformers."""

import json

import numpy as np
import pytest

from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKLConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import families  # noqa: E402  (beside this file)
import networks  # noqa: E402
import references  # noqa: E402
from cases import further  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")


@pytest.fixture
def compare(tmp_path):
    """Returns a function that saves a network with other weights and compares both outputs."""

    def compare(name, reference, **inputs):
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in reference.parameters():  # no norm stays one and no bias zero
                weight.add_(0.1 * torch.randn_like(weight))
        reference.eval().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        arrays = networks.inputs(name, config, **inputs)
        ours = networks.outputs(name, networks.load(name, tmp_path), arrays)
        theirs = references.outputs(reference, arrays)
        assert ours.keys() == theirs.keys()
        for output, expected in theirs.items():
            assert networks.difference(ours[output], expected) <= networks.BOUND, output

    return compare


# The keys of the former are saved without a prefix, those of the latter with one.
PLAIN, PROJECTED = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
TEXT_ENCODERS = {
    "SD 1 and XL's first": (PLAIN, families.CLIP_L),
    "SD 2": (PLAIN, families.OPEN_CLIP_H),
    "XL's second": (PROJECTED, families.OPEN_CLIP_G),
    "first end token": (PLAIN, families.CLIP_L | {"eos_token_id": 99}),
    "first end token, projected": (PROJECTED, families.OPEN_CLIP_G | {"eos_token_id": 99}),
    "another epsilon": (PLAIN, families.CLIP_L | {"layer_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("variant", TEXT_ENCODERS)
def test_text_encoders(compare, variant):
    network, config = TEXT_ENCODERS[variant]
    compare("text_encoder", network(transformers.CLIPTextConfig(**config)))


UNETS = {
    "SD 1": families.UNET,
    "SD 2": families.UNET_2 | {"upcast_attention": True},
    "XL": families.UNET_XL,
    "XL refiner": families.UNET_REFINER | {"transformer_layers_per_block": 4},
    "LCM": families.UNET | {"time_cond_proj_dim": 256},
    "bundled": families.UNET
    | {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
UNETS["two layers a block"] = UNETS["bundled"] | {"layers_per_block": 2, "norm_eps": 1e-3}
UNETS["nine channels, other sinusoids"] = UNETS["bundled"] | {
    "in_channels": 9,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


# models/test_golden_networks.py has the further ones, too. The up blocks crop odd sizes.
@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("bundled", (5, 11)),
        ("two layers a block", (8, 8)),
        ("nine channels, other sinusoids", (8, 8)),
        further("XL refiner", (5, 11)),
        *(further(name, (8, 8)) for name in ("SD 1", "SD 2", "XL", "LCM")),
    ],
)
def test_unets(compare, variant, size):
    compare("unet", diffusers.UNet2DConditionModel(**UNETS[variant]), size=size)


@pytest.mark.parametrize("variant", ["two layers a block", further("XL")])
def test_a_unet_reuses_deep_features_of_an_earlier_evaluation(tmp_path, variant):
    """Compares DeepCache with diffusers' network, in which a hook reuses the features."""
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(**UNETS[variant]).eval()
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before = networks.inputs("unet", config)
    after = before | {
        "latents": networks.drawn("later", before["latents"].shape),
        "timesteps": before["timesteps"] - 17,
    }
    ours = networks.load("unet", tmp_path)
    whole, deep = ours(**before, method="evaluate")
    spared, same = ours(**after, deep=deep, method="evaluate")
    np.testing.assert_array_equal(same, deep)

    last, seen = reference.up_blocks[-1].resnets[-1], []

    def keep(_, arguments):  # the features come before the skip
        seen.append(arguments[0][:, : deep.shape[-1]])
        return (torch.cat([seen[0], arguments[0][:, deep.shape[-1] :]], dim=1), *arguments[1:])

    last.register_forward_pre_hook(keep)
    for inputs, output in ((before, whole), (after, spared)):
        expected = references.outputs(reference, inputs)["output"]
        assert networks.difference(output, expected) <= networks.BOUND
    assert (
        networks.difference(*[features.numpy() for features in seen]) > 0.01
    )  # without the hook, the features would differ


AUTOENCODERS = {
    "SD": families.VAE,
    "two layers a block": families.VAE | {"layers_per_block": 2},
    "three blocks": families.VAE
    | {
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "SD 3": families.VAE
    | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": families.VAE | {"mid_block_add_attention": False},
}


@pytest.mark.parametrize("variant", AUTOENCODERS)
def test_autoencoders(compare, variant):
    compare("vae", diffusers.AutoencoderKL(**AUTOENCODERS[variant]))


def test_latents_are_scaled_for_each_channel_as_the_xl_pipeline_does():
    mean, std = [0.5, -1.0, 2.0, 0.25], [1.5, 2.0, 0.5, 8.0]
    config = AutoencoderKLConfig(latents_mean=tuple(mean), latents_std=tuple(std))
    latents = networks.drawn("latents", (2, 3, 5, 4))
    expected = latents * std / config.scaling_factor + mean
    np.testing.assert_allclose(config.unscale(latents), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(config.scale(config.unscale(latents)), latents, atol=1e-5)
