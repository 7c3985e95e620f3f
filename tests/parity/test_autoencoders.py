"""The autoencoders of Flux.2, Qwen-Image and Sana give the outputs of diffusers'."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.families import qwen_image
from jaxdiff.models.codecs import autoencoder_kl_qwen_image as qwen
from jaxdiff.models.codecs.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from jaxdiff.models.codecs.autoencoder_kl_flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from jaxdiff.weights.load import file_shapes, load_params, places
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import networks  # noqa: E402
from published_autoencoders import (  # noqa: E402  (beside this file)
    FULL_DC,
    FULL_FLUX_2,
    FULL_QWEN_IMAGE,
)

pytestmark = pytest.mark.usefixtures("compiled_faster")

FLUX_2 = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
QWEN_IMAGE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.5, -1.0, 2.0, 0.25],
    "latents_std": [1.5, 2.0, 0.5, 8.0],
}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
for half in ("encoder", "decoder"):
    DC |= {
        f"{half}_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        f"{half}_block_out_channels": (8, 16, 32),
        f"{half}_qkv_multiscales": ((), (5,), ()),
        f"{half}_layers_per_block": (1, 2, 1),
    }
VARIANTS = {
    "Flux.2": ("AutoencoderKLFlux2", FLUX_2),
    "Flux.2, other decoder": (
        "AutoencoderKLFlux2",
        FLUX_2
        | {
            "decoder_block_out_channels": (4, 12),
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "batch_norm_eps": 0.5,
        },
    ),
    "Qwen-Image": ("AutoencoderKLQwenImage", QWEN_IMAGE),
    "Qwen-Image, deeper": (
        "AutoencoderKLQwenImage",
        QWEN_IMAGE
        | {
            "dim_mult": [2, 1, 3, 3],
            "num_res_blocks": 2,
            "temperal_downsample": [True, False, True],
        },
    ),
    "Sana": ("AutoencoderDC", DC),
    "Sana, two scales": (
        "AutoencoderDC",
        DC
        | {
            "encoder_qkv_multiscales": ((), (3,), (3, 5)),
            "decoder_block_out_channels": (16, 16, 8),
            "decoder_block_types": "EfficientViTBlock",
            "decoder_norm_types": ("rms_norm",) * 3,
        },
    ),
}
# Latents high and wide. Those of the deepest attention are at most 4 for diffusers' quadratic form.
SIZES = {"Sana": [(1, 3), (3, 5)]}
OURS = {
    "AutoencoderKLFlux2": (AutoencoderKLFlux2, AutoencoderKLFlux2Config),
    "AutoencoderKLQwenImage": (qwen.AutoencoderKLQwenImage, qwen.AutoencoderKLQwenImageConfig),
    "AutoencoderDC": (AutoencoderDC, AutoencoderDCConfig),
}


def made(name: str, options: dict):
    """diffusers' network, with weights of about the size of trained ones."""
    reference = getattr(diffusers, name)(**options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in reference.state_dict().items():
            if key == "bn.num_batches_tracked":
                continue
            weight.normal_(0, 1, generator=generator)
            if key == "bn.running_var":
                weight.exp_()
            elif key.endswith(".bias"):
                weight.mul_(0.3)
            elif key.endswith(".gamma") or weight.ndim == 1:  # of a norm, but for running_mean
                weight.mul_(0.3).add_(key != "bn.running_mean")
            elif ".time_conv." in key:
                weight.mul_(100)
            else:
                weight.mul_(weight.shape[1:].numel() ** -0.5)
            if weight.ndim == 5:
                weight[:, :, :-1] *= 100  # the taps that see no frame
                weight[:, :, -1] *= weight.shape[2] ** 0.5
    return reference


def plain(weights: dict) -> dict[str, np.ndarray]:
    """diffusers' weights by our keys, without those that no image needs."""
    found = {
        qwen_image.QWEN_IMAGE.components["vae"].plain_key(key): value[:, :, -1]
        if value.ndim == 5
        else value
        for key, value in weights.items()
    }
    return {
        key: value for key, value in found.items() if key not in (None, "bn.num_batches_tracked")
    }


def loaded(reference):
    """Our network with diffusers' weights: its config, and `run(method, array)`."""
    network_class, config_class = OURS[type(reference).__name__]
    config = config_class.from_json(json.loads(reference.to_json_string()))
    graph, shapes = abstract_network(network_class, config)
    weights = plain({key: value.numpy() for key, value in reference.state_dict().items()})
    tensors = {
        key: SimpleNamespace(shape=value.shape, read=lambda value=value: value)
        for key, value in weights.items()
    }
    params = load_params(places(shapes, np.float32), tensors)

    def run(method, array):
        return compilation.jit(lambda params, x: getattr(nnx.merge(graph, params), method)(x))(
            params, array
        )

    return config, run


def channels_first(x: np.ndarray):
    return torch.tensor(x).permute(0, 3, 1, 2)


def channels_last(x) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


def references(reference, images: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    """What diffusers' pipelines make of images, and of latents from their denoisers."""
    images, latents = channels_first(images), channels_first(latents)
    with torch.no_grad():
        if isinstance(reference, diffusers.AutoencoderDC):
            return {
                "mean": channels_last(reference.encode(images).latent),
                "images": channels_last(
                    reference.decode(latents / reference.config.scaling_factor).sample
                ),
            }
        if isinstance(reference, diffusers.AutoencoderKLQwenImage):
            posterior = reference.encode(images[:, :, None]).latent_dist
            mean, std = (
                torch.tensor(numbers).view(1, -1, 1, 1)
                for numbers in (reference.config.latents_mean, reference.config.latents_std)
            )
            frames = reference.decode((latents * std + mean)[:, :, None]).sample
            return {
                "mean": channels_last(posterior.mean[:, :, 0]),
                "log_variance": channels_last(posterior.logvar[:, :, 0]),
                "images": channels_last(frames[:, :, 0]),
            }
        pipeline, bn = diffusers.Flux2KleinPipeline, reference.bn
        std = (bn.running_var + reference.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        mean = bn.running_mean.view(1, -1, 1, 1)
        log_variance = pipeline._patchify_latents(reference.encode(images).latent_dist.logvar)
        unnormed = pipeline._unpatchify_latents(latents * std + mean)
        encode = pipeline._encode_vae_image
        return {
            "mean": channels_last(encode(borrowed(reference), images, None)),
            "log_variance": channels_last(log_variance - 2 * std.log()),
            "images": channels_last(reference.decode(unnormed).sample),
        }


def borrowed(reference):
    """What a method of diffusers' pipeline of Flux.2 uses of it."""
    return SimpleNamespace(
        vae=reference, _patchify_latents=diffusers.Flux2KleinPipeline._patchify_latents
    )


@pytest.mark.parametrize(
    ("variant", "size"),
    [(name, size) for name in VARIANTS for size in SIZES.get(name, [(2, 3)])],
)
def test_images_and_latents_are_diffusers(variant, size):
    reference = made(*VARIANTS[variant])
    config, run = loaded(reference)
    height, width = size
    images = networks.drawn("images", (2, height * config.factor, width * config.factor, 3))
    latents = networks.drawn("latents", (2, *size, config.channels))
    mean, log_variance = run("encode", np.tanh(images))
    ours = {
        "mean": mean,
        "log_variance": log_variance,
        "images": run("decode", config.unscale(latents)),
    }
    expected = references(reference, np.tanh(images), latents)
    for output, value in expected.items():
        assert networks.difference(ours[output], value) <= networks.BOUND, output
    assert ours["log_variance"].shape == latents.shape
    if "log_variance" not in expected:
        assert (log_variance == -30).all()


@pytest.mark.parametrize("name", OURS)
def test_scaling_is_undone(name):
    options = {"AutoencoderKLFlux2": FLUX_2, "AutoencoderKLQwenImage": QWEN_IMAGE}.get(name, DC)
    config = OURS[name][1].from_json(json.loads(json.dumps(options)))
    latents = networks.drawn("latents", (2, 3, 5, config.channels))
    np.testing.assert_allclose(config.scale(config.unscale(latents)), latents, atol=1e-5)
    assert config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "published", "factor", "channels", "millions"),
    [
        ("AutoencoderKLFlux2", FULL_FLUX_2, 16, 128, 84.05),
        ("AutoencoderKLQwenImage", FULL_QWEN_IMAGE, 8, 16, None),
        ("AutoencoderDC", FULL_DC, 32, 32, 312.25),
    ],
)
def test_the_published_configs_have_diffusers_keys(name, published, factor, channels, millions):
    network_class, config_class = OURS[name]
    config = config_class.from_json({"_class_name": name, **published})
    ours = file_shapes(abstract_network(network_class, config)[1])
    with torch.device("meta"):
        theirs = plain(getattr(diffusers, name).from_config(published).state_dict())
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    assert (config.factor, config.channels) == (factor, channels)
    if millions:
        assert round(sum(map(np.prod, ours.values())) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "published", "key", "value"),
    [
        ("AutoencoderKLFlux2", FULL_FLUX_2, "patch_size", [1, 1]),
        ("AutoencoderKLFlux2", FULL_FLUX_2, "norm_num_groups", 7),
        ("AutoencoderKLFlux2", FULL_FLUX_2, "decoder_block_out_channels", [96, 192]),
        ("AutoencoderKLQwenImage", FULL_QWEN_IMAGE, "attn_scales", [0.5]),
        ("AutoencoderKLQwenImage", FULL_QWEN_IMAGE, "temperal_downsample", [True]),
        ("AutoencoderKLQwenImage", FULL_QWEN_IMAGE, "latents_std", [1.0]),
        ("AutoencoderKLQwenImage", FULL_QWEN_IMAGE | {"dim_mult": [1] * 4}, "base_dim", 95),
        ("AutoencoderDC", FULL_DC, "downsample_block_type", "pixel_unshuffle"),
        ("AutoencoderDC", FULL_DC, "upsample_block_type", "pixel_shuffle"),
        ("AutoencoderDC", FULL_DC, "decoder_norm_types", ["batch_norm"] * 6),
        ("AutoencoderDC", FULL_DC, "decoder_act_fns", "relu"),
        ("AutoencoderDC", FULL_DC, "encoder_block_types", "ViT"),
        ("AutoencoderDC", FULL_DC, "encoder_layers_per_block", [0, 4, 8, 2, 2, 2]),
        ("AutoencoderDC", FULL_DC, "encoder_qkv_multiscales", 5),
        ("AutoencoderDC", FULL_DC, "encoder_qkv_multiscales", [[], [], [], [5], [4], [5]]),
        ("AutoencoderDC", FULL_DC, "decoder_block_out_channels", [128, 256, 512, 512, 1024, 1000]),
        ("AutoencoderDC", FULL_DC, "attention_head_dim", 24),
        ("AutoencoderDC", FULL_DC, "latent_channels", 48),
    ],
)
def test_unsupported_values_are_rejected_with_their_key(name, published, key, value):
    with pytest.raises(InputError, match=rf"^vae/config\.json: .*{key}") as refusal:
        OURS[name][1].from_json({**published, key: value})
    assert "\n" not in str(refusal.value)


ON_TWO_DEVICES = """
import importlib, json, sys
import jax, networks, numpy as np
from flax import nnx
from jaxdiff.devices import parallel
from jaxdiff.weights.load import name_of
from jaxdiff.weights.network import abstract_network

mesh = parallel.make_mesh("model=2")
for place, name, options in json.loads(sys.argv[1]):
    module = importlib.import_module(place)
    config = getattr(module, f"{name}Config").from_json(options)
    graph, shapes = abstract_network(getattr(module, name), config)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: networks.weight(name_of(path), leaf.shape), shapes)
    split = jax.device_put(params, parallel.parameter_shardings(mesh, shapes, module.SHARDING))
    images = networks.drawn("images", (1, config.factor, 2 * config.factor, 3))
    latents = networks.drawn("latents", (1, 2, 3, config.channels))

    @jax.jit
    def both(params, images, latents):
        network = nnx.merge(graph, params)
        return network.encode(images)[0], network.decode(latents)

    alone, together = both(params, images, latents), both(split, images, latents)
    print(*map(networks.difference, map(np.asarray, together), map(np.asarray, alone)))
"""


def test_weights_split_over_a_mesh_give_the_same_outputs():
    chosen = [VARIANTS[variant] for variant in ("Qwen-Image", "Sana")]
    given = json.dumps([(OURS[name][0].__module__, name, options) for name, options in chosen])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "NPROC": "4",  # as `parallel.make_mesh` advises
        "PYTHONPATH": str(Path(networks.__file__).parent),
    }
    said = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES, given],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    differences = [float(number) for number in said.split()]
    assert len(differences) == 2 * len(chosen)
    assert all(difference < 1e-5 for difference in differences), differences
