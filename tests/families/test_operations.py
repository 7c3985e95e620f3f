"""The operations counted from shapes roughly match XLA's count for the compiled program."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxdiff.checkpoint.single_file_configs import CONTENTS
from jaxdiff.dataset import settings as job_settings
from jaxdiff.families import FAMILIES, operations, unet_operations
from jaxdiff.families.model import networks_of
from jaxdiff.families.opening import open_ensemble
from jaxdiff.models import products
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.request import Bucket
from jaxdiff.weights.load import file_shapes
from jaxdiff.weights.network import abstract_network


def counted(shapes: dict, height: int, width: int, prefix: str = "") -> int:
    tensors = {
        key.removeprefix(prefix): SimpleNamespace(shape=shape, size=math.prod(shape))
        for key, shape in file_shapes(shapes).items()
        if key.startswith(prefix)
    }
    return int(unet_operations.of_network(tensors, height, width))


def of_xla(call, graph, shapes, *inputs: tuple[int, ...]) -> float:
    program = jax.jit(lambda params, *given: call(nnx.merge(graph, params), *given))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return program.lower(shapes, *arrays).cost_analysis()["flops"]


@pytest.fixture(scope="module")
def shapes64():
    return networks_of(open_ensemble("shapes64").base).configs


def test_a_unets_operations_match_xlas_count(shapes64):
    config = shapes64["unet"]
    graph, shapes = abstract_network(UNet2DConditionModel, config)
    given = (1, 16, 16, config.in_channels), (1,), (1, 77, config.cross_attention_dim)
    xla = of_xla(UNet2DConditionModel.__call__, graph, shapes, *given)
    assert counted(shapes, 16, 16) == pytest.approx(xla, rel=0.25)


def test_the_operations_of_a_unets_outermost_layers_match_xlas_count(shapes64):
    config = shapes64["unet"]
    graph, shapes = abstract_network(UNet2DConditionModel, config)
    given = (1, 16, 16, config.in_channels), (1,), (1, 77, config.cross_attention_dim)
    deep = (1, 16, 16, config.block_out_channels[0])
    xla = of_xla(UNet2DConditionModel.evaluate, graph, shapes, *given, deep)
    outermost = unet_operations.outermost(open_ensemble("shapes64").base.weights("unet"))
    assert unet_operations.of_network(outermost, 16, 16) == pytest.approx(xla, rel=0.25)


def test_a_decoders_operations_match_xlas_count(shapes64, monkeypatch):
    monkeypatch.setattr(products, "FEWEST_PIXELS", math.inf)  # halves what is counted
    config = shapes64["vae"]
    graph, shapes = abstract_network(AutoencoderKL, config)
    xla = of_xla(AutoencoderKL.decode, graph, shapes, (1, 16, 16, config.latent_channels))
    assert counted(shapes, 16, 16, "decoder.") == pytest.approx(xla, rel=0.25)


def test_stable_diffusions_unet_has_the_published_count():
    """Expects 0.80e12, twice the 401.9 G multiply-accumulates of profilers at 64x64 latents."""
    config = UNetConfig.from_json(CONTENTS[768].configs["unet"])
    _, shapes = abstract_network(UNet2DConditionModel, config)
    assert counted(shapes, 64, 64) == pytest.approx(0.80e12, rel=0.02)


def test_an_images_count_covers_its_evaluations_and_the_decoder():
    model = open_ensemble("shapes64")
    usual = job_settings.resolve({}, model)

    def of(steps=10, sampler="ddim", guided=True, **options) -> int:
        bucket = Bucket(64, 64, steps, guided, sampler)
        return operations.of_image(model, dataclasses.replace(usual, **options), bucket)

    one = of(11, guided=False) - of(10, guided=False)
    decoder = of(10, guided=False) - 10 * one
    assert 0 < decoder < of()
    assert of() == 20 * one + decoder
    assert of(sampler="heun") == 38 * one + decoder  # the last step has no corrector
    assert of(guidance_stop=0.5) == 15 * one + decoder
    spared = 2 * one + decoder - of(2, guided=False, deep_cache=2)
    assert 0 < spared < one
    assert of(deep_cache=4) == of() - 2 * 7 * spared  # 3 of 10 evaluations are complete
    # Unguided, guided and unguided ranges of 3, 4 and 3 rows, each of which starts a new group.
    interval = {"guidance_start": 0.3, "guidance_stop": 0.7}
    assert of(**interval, deep_cache=3) == of(**interval) - (2 + 2 * 2 + 2) * spared
    assert one < of(guided=False, prompt_chunks=3) - of(guided=False) + one


def test_a_refiners_steps_are_counted_with_its_own_network(tiny_checkpoint):
    alone, both = (open_ensemble(tiny_checkpoint, refiner=r) for r in (None, tiny_checkpoint))
    settings = job_settings.resolve({}, alone)
    bucket = Bucket(64, 64, 10, True, "ddim")
    assert operations.of_image(both, settings, bucket) == operations.of_image(
        alone, settings, bucket
    )


SD3_MEDIUM = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
KLEIN_4B = {
    "attention_head_dim": 128,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
}


@pytest.mark.parametrize(
    ("pipeline", "config", "tokens", "published"),
    [
        ("FluxPipeline", {"guidance_embeds": True}, 512, 74.4),
        ("StableDiffusion3Pipeline", SD3_MEDIUM, 333, 8.9),
        ("PixArtSigmaPipeline", {"use_additional_conditions": False}, 300, 6.6),
        ("SanaPipeline", {}, 300, 3.0),
        ("Flux2KleinPipeline", KLEIN_4B, 512, 34.8),
        ("ZImagePipeline", {}, 32, 55.6),
        ("QwenImagePipeline", {}, 16, 69.3),
    ],
)
def test_transformers_have_the_count_of_pytorchs_counter(pipeline, config, tokens, published):
    """In 10^12 operations for one evaluation at 1024 px, measured with torch's FlopCounterMode."""
    family = FAMILIES[pipeline]
    networks, stored = family.networks(), family.components["transformer"]
    parsed = {"transformer": {"_class_name": stored.class_name, **config}}
    read = networks.read_configs(parsed)["transformer"]
    _, shapes = abstract_network(networks.module("transformer", read), read)
    weights = {
        key: SimpleNamespace(shape=shape, size=math.prod(shape))
        for key, shape in file_shapes(shapes).items()
    }
    checkpoint = SimpleNamespace(weights=lambda _: weights, config=lambda _: read.to_json())
    side = 1024 // {"SanaPipeline": 32, "Flux2KleinPipeline": 16}.get(pipeline, 8)
    counted, spared = family.operations(checkpoint, side, side, tokens)
    assert counted == spared == pytest.approx(published * 1e12, rel=0.02)
