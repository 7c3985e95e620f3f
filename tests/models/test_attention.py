"""Attention in blocks is attention: exact, bounded in memory, and the same in every batch."""

import jax
import numpy as np
import pytest

from jaxdiff.models import attention as kernels
from jaxdiff.models.attention import attention

HEADS = 2


def drawn(*shapes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def by_definition(query, key, value):
    """Vaswani et al., 2017, equation 1, in float64, one head at a time."""
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
        (1100, 1100),  # blocks of 550, and not of 953
        (1024, 77),
        (1021, 2000),  # a prime number of tokens: a row at a time
    ],
)
def test_it_is_what_the_paper_says(tokens, context):
    query, key, value = drawn((2, tokens, 16), (2, context, 16), (2, context, 16))
    mixed = jax.jit(attention, static_argnums=3)(query, key, value, HEADS)
    np.testing.assert_allclose(mixed, by_definition(query, key, value), atol=1e-5)


def test_other_devices_attend_with_the_whole_batch_at_once(monkeypatch):
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


def test_its_gradient_is_that_of_plain_attention(monkeypatch):
    arrays = drawn((1, 300, 8), (1, 250, 8), (1, 250, 8))
    blockwise = gradients(*arrays)
    monkeypatch.setattr(kernels, "BLOCKWISE", np.inf)
    for ours, plain in zip(blockwise, gradients(*arrays), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("function", [lambda *a: attention(*a, HEADS), gradients])
def test_memory_grows_with_the_tokens_and_not_with_their_square(function):
    """16,384 tokens are the autoencoder's for 1024 x 1024 pixels: their scores would be 2 GB."""
    shape = jax.ShapeDtypeStruct((1, 16384, 16), np.float32)
    compiled = jax.jit(function).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


def test_bfloat16_has_its_softmax_in_float32():
    arrays = drawn(*[(1, 300, 16)] * 3)
    half = [array.astype("bfloat16") for array in arrays]
    mixed = attention(*half, HEADS)
    assert mixed.dtype == half[0].dtype
    exact = by_definition(*(array.astype(np.float32) for array in half))
    np.testing.assert_allclose(
        mixed.astype(np.float32), exact, atol=4e-3
    )  # its spacing at 0.5 to 1
