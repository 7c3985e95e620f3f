"""Attention by every kernel is exact, bounded in memory and independent of the batch."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas import tpu as pallas
from jax.sharding import AxisType

from jaxdiff.models import attention as kernels
from jaxdiff.models.attention import attend, attention

HEADS = 2


def drawn(*shapes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def by_definition(query, key, value):
    """Computes Vaswani et al., 2017, equation 1, in float64, one head at a time."""
    outputs = []
    for head in np.split(np.arange(query.shape[-1]), HEADS):
        q, k, v = (x[..., head].astype(np.float64) for x in (query, key, value))
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(len(head)))
        outputs.append(scores / scores.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(outputs, axis=-1)


@pytest.mark.parametrize(
    ("tokens", "context"),
    [
        (64, 77),  # plain
        (300, 300),  # one block
        (1100, 1100),  # blocks of 550 rows, because 953 does not divide 1100
        (1024, 77),
        (1021, 2000),  # a prime number of tokens: one row at a time
    ],
)
def test_attention_matches_the_papers_formula(tokens, context):
    query, key, value = drawn((2, tokens, 16), (2, context, 16), (2, context, 16))
    mixed = jax.jit(attention, static_argnums=3)(query, key, value, HEADS)
    np.testing.assert_allclose(mixed, by_definition(query, key, value), atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # without a mask, the latter's blocks differ
@pytest.mark.parametrize("tokens", [64, 300])  # plain; in blocks
def test_masked_tokens_are_not_seen(tokens, platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    query, key, value = drawn((3, tokens, 2, 8), (3, 300, 2, 8), (3, 300, 2, 8))
    lengths = np.array([1, 7, 300])
    mixed = attend(query, key, value, mask=np.arange(300) < lengths[:, None])
    for i, length in enumerate(lengths):
        seen = [
            x[i : i + 1].reshape(1, -1, 16) for x in (query, key[:, :length], value[:, :length])
        ]
        np.testing.assert_allclose(mixed[i].reshape(1, -1, 16), by_definition(*seen), atol=1e-5)


def test_a_head_of_the_keys_serves_a_group_of_the_querys():
    query, key, value = drawn((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    groups = [np.repeat(x, 2, axis=2) for x in (key, value)]
    mixed = attend(query, key, value, is_causal=True)
    np.testing.assert_allclose(mixed, attend(query, *groups, is_causal=True), atol=1e-6)


def test_blocks_cover_the_whole_batch_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(kernels, "MOST_SCORES", 2 * HEADS * 550 * 1000)  # blocks of 550
    query, key, value = drawn((2, 1100, 16), (2, 1000, 16), (2, 1000, 16))
    mixed = attention(query, key, value, HEADS)
    np.testing.assert_allclose(mixed, by_definition(query, key, value), atol=1e-5)


def test_an_image_does_not_depend_on_the_batch():
    images = drawn(*[(3, 1100, 16)] * 3)
    attend = jax.jit(attention, static_argnums=3)
    together = attend(*images, HEADS)
    for i in range(3):
        alone = attend(*(image[i : i + 1] for image in images), HEADS)
        np.testing.assert_array_equal(alone[0], together[i])


def gradients(*arrays):
    return jax.grad(lambda *a: (attention(*a, HEADS) ** 2).sum(), argnums=(0, 1, 2))(*arrays)


def test_the_gradient_matches_plain_attention(monkeypatch):
    arrays = drawn((1, 300, 8), (1, 250, 8), (1, 250, 8))
    blockwise = gradients(*arrays)
    monkeypatch.setattr(kernels, "BLOCKWISE", np.inf)
    for ours, plain in zip(blockwise, gradients(*arrays), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("function", [lambda *a: attention(*a, HEADS), gradients])
def test_memory_does_not_grow_with_the_square_of_the_tokens(function):
    """The autoencoder has 16,384 tokens at 1024 x 1024 pixels: their scores would take 2 GB."""
    shape = jax.ShapeDtypeStruct((1, 16384, 16), np.float32)
    compiled = jax.jit(function).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


def test_bfloat16_uses_a_float32_softmax():
    arrays = drawn(*[(1, 300, 16)] * 3)
    half = [array.astype("bfloat16") for array in arrays]
    mixed = attention(*half, HEADS)
    assert mixed.dtype == half[0].dtype
    exact = by_definition(*(array.astype(np.float32) for array in half))
    np.testing.assert_allclose(
        mixed.astype(np.float32), exact, atol=4e-3
    )  # bfloat16's spacing from 0.5 to 1


@pytest.mark.parametrize("mask", [None, np.arange(700)[None] < 500])
def test_a_tpus_kernel_and_its_gradient_match_plain_attention(mask):
    # The last block of tokens is not full; heads are wider than 128 and not a multiple of it.
    tokens, context, width = 300, 700, 160
    arrays = drawn((1, tokens, 2, width), (1, context, 2, width), (1, context, 2, width))

    def squares(kernel):
        def total(*arrays):
            return (kernel(*arrays, mask) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))

    with pallas.force_tpu_interpret_mode():
        ours = squares(kernels._attend_by_pallas)(*arrays)
    plain = squares(kernels._attend_at_once)(*arrays)
    for array, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(array, other, atol=1e-4, rtol=1e-5)


def asked_for(monkeypatch, platform, dtype, *shapes, capability=None, training=False):
    """Returns the kernels that a device's program calls; the program is built but not run."""
    monkeypatch.setattr(jax, "default_backend", lambda: {"cuda": "gpu"}.get(platform, platform))
    devices = [SimpleNamespace(compute_capability=capability)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: least == capability)
    query, key = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def attend(*arrays):
        return attention(*arrays, num_heads=8)

    def train(*arrays):
        return jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*arrays)

    traced = jax.jit(train if training else attend).trace(query, key, key)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"custom_call @([\w$]+)\(", text)


SELF, CROSS = ((2, 4096, 320),) * 2, ((2, 4096, 320), (2, 77, 320))  # Stable Diffusion's, at 512


@pytest.mark.parametrize("shapes", [SELF, CROSS])
def test_a_gpu_uses_cudnns_kernel_in_bfloat16(shapes, monkeypatch):
    found = asked_for(monkeypatch, "cuda", jnp.bfloat16, *shapes, capability="8.0")
    assert found == ["__cudnn$fmhaSoftmax"]


def test_a_tpu_uses_pallas_kernel_in_bfloat16(monkeypatch):
    assert asked_for(monkeypatch, "tpu", jnp.bfloat16, *SELF) == ["tpu_custom_call"]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_devices_of_the_mesh_choose_the_kernel_not_those_of_the_host(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: {"cpu": "tpu", "tpu": "cpu"}[platform])
    device = jax.sharding.AbstractDevice("any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    array = jax.ShapeDtypeStruct(SELF[0], jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = str(jax.make_jaxpr(lambda *arrays: attention(*arrays, 8))(array, array, array))
    assert ("pallas_call" in traced) == (platform == "tpu")


def test_the_kernels_have_gradients(monkeypatch):
    on_gpu = asked_for(monkeypatch, "cuda", jnp.bfloat16, *SELF, capability="9.0", training=True)
    assert on_gpu == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    on_tpu = asked_for(monkeypatch, "tpu", jnp.bfloat16, *CROSS, training=True)
    assert on_tpu == ["tpu_custom_call"] * 3  # forward; gradients of queries; of keys and values


@pytest.mark.parametrize(
    ("capability", "width", "is_taken"),
    [
        ("7.5", 64, False),
        ("8.6", 160, False),
        ("9.0", 160, True),
        ("9.0", 512, False),  # the autoencoder's
        ("12.0", 128, True),
        ("gfx942", 64, False),
    ],
)
def test_cudnn_gets_only_heads_that_the_gpu_supports(capability, width, is_taken, monkeypatch):
    shapes = ((2, 1024, 8 * width),) * 2
    found = asked_for(monkeypatch, "cuda", jnp.bfloat16, *shapes, capability=capability)
    assert found == ["__cudnn$fmhaSoftmax"] * is_taken


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_float32_is_never_rounded_by_a_kernel(platform, monkeypatch):
    assert asked_for(monkeypatch, platform, jnp.float32, *SELF, capability="9.0") == []
