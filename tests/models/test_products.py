"""Products on CPUs: XLA's results, equal in each slot, and bfloat16 multiplied as it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import processor
from jaxdiff.devices import compilation
from jaxdiff.models import products

HALF = jnp.bfloat16
ROUNDING = 2.0**-8  # bfloat16's unit roundoff, of a result that was rounded once
SAME = ((1, 1), (1, 1))


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape, np.float32), HALF)


def exact(x: jax.Array, kernel: jax.Array, strides, padding) -> np.ndarray:
    return np.asarray(
        jax.lax.conv_general_dilated(
            x.astype(jnp.float32),
            kernel.astype(jnp.float32),
            strides,
            padding,
            dimension_numbers=products.NHWC,
        )
    )


def assert_rounded(half: jax.Array, wanted: np.ndarray) -> None:
    assert half.dtype == HALF
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(
        np.asarray(half, np.float32), wanted, rtol=ROUNDING, atol=1e-5 * np.abs(wanted).max()
    )


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "strides", "padding"),
    [
        ((2, 9, 7), (16, 24), 3, (1, 1), SAME),
        ((2, 8, 8), (24, 16), 3, (2, 2), ((0, 1), (0, 1))),
        ((1, 6, 6), (16, 16), 2, (1, 1), SAME),
        ((3, 5, 4), (16, 32), 1, (1, 1), ((0, 0), (0, 0))),
        ((1, 8, 8), (16, 16), 4, (4, 4), ((0, 0), (0, 0))),
        ((1, 6, 5), (4, 32), 3, (1, 1), SAME),  # by XLA itself
        ((1, 75, 64), (64, 16), 3, (1, 1), SAME),  # five blocks of 13 rows, one of 10
        ((2, 90, 60), (32, 16), 3, (2, 2), SAME),  # 23 rows, then 22
    ],
)
def test_convolutions_are_rounded_once(size, channels, kernel, strides, padding, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 2**20)
    x, weights = random(*size, channels[0]), random(kernel, kernel, *channels)
    made = jax.jit(
        lambda x, weights: products.conv_general_dilated(
            x, weights, strides, padding, dimension_numbers=products.NHWC
        )
    )(x, weights)
    assert_rounded(made, exact(x, weights, strides, padding))


def test_products_are_rounded_once():
    x, matrix = random(3, 40, 64), random(64, 24)
    made = products.dot_general(x, matrix, (((2,), (0,)), ((), ())))
    assert_rounded(made, x.astype(jnp.float32) @ matrix.astype(jnp.float32))


def test_gradients_are_those_of_the_convolution():
    x, weights = random(2, 8, 8, 16), random(3, 3, 16, 24)

    def total(convolve):
        def loss(x, weights):
            made = convolve(x, weights, (2, 2), SAME, dimension_numbers=products.NHWC)
            return jnp.sum(made.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    for ours, wanted in zip(
        total(products.conv_general_dilated), total(jax.lax.conv_general_dilated), strict=True
    ):
        wanted = np.asarray(wanted, np.float32)
        difference = np.asarray(ours, np.float32) - wanted
        assert np.linalg.norm(difference) <= 2 * ROUNDING * np.linalg.norm(wanted)


@pytest.mark.parametrize("padding", [SAME, ((0, 1), (0, 0)), ((0, 0), (2, 1))])
def test_large_convolutions_take_half_of_the_products(padding):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 42, 31, 32), np.float32)  # rows that four do not divide
    weights = random.standard_normal((3, 3, 32, 24), np.float32)

    def convolve(convolution):
        return lambda x, weights: convolution(
            x, weights, (1, 1), padding, dimension_numbers=products.NHWC
        )

    def gradients(convolution):
        return jax.grad(lambda *inputs: jnp.sum(convolution(*inputs) ** 2), (0, 1))(x, weights)

    def operations(convolution):
        return convolution.lower(x, weights).compile().cost_analysis()["flops"]

    ours = jax.jit(convolve(products.conv_general_dilated))
    theirs = jax.jit(convolve(jax.lax.conv_general_dilated))
    wanted = np.asarray(theirs(x, weights))
    np.testing.assert_allclose(ours(x, weights), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for made, gradient in zip(gradients(ours), gradients(theirs), strict=True):
        assert np.linalg.norm(made - gradient) <= 1e-5 * np.linalg.norm(gradient)
    assert operations(ours) < 0.65 * operations(theirs)


@pytest.mark.parametrize("name", ["product", "convolution"])
def test_operands_stay_bfloat16_in_the_compiled_program(name):
    x, weights = random(2, 8, 8, 32), random(3, 3, 32, 32)
    calls = {
        "product": lambda x, weights: products.dot_general(
            x, weights[0, 0], (((3,), (0,)), ((), ()))
        ),
        "convolution": lambda x, weights: products.conv_general_dilated(
            x, weights, (1, 1), SAME, dimension_numbers=products.NHWC
        ),
    }
    text = compilation.jit(calls[name]).lower(x, weights).compile().as_text()
    (operands,) = re.findall(r" dot\(%(\S+), %(\S+)\)", text)
    assert all(f"%{operand} = bf16[" in text for operand in operands)
    assert "__ynn_fusion" in text
    assert "convolution(" not in text


# Sizes of the bundled models, with one and with two evaluations of each image, and odd ones.
@pytest.mark.parametrize("here", [True, False], ids=["this processor", "without AVX-512"])
@pytest.mark.parametrize("batch", [2, 5, 8, 16])
@pytest.mark.parametrize(
    ("side", "channels", "features", "kernel", "stride"),
    [
        (1, 64, 64, 3, 1),
        (2, 64, 64, 3, 1),
        (7, 16, 16, 3, 1),
        (8, 4, 32, 3, 1),
        (8, 32, 64, 1, 1),
        (8, 64, 64, 3, 2),
        (16, 64, 128, 2, 1),
        (32, 32, 4, 1, 1),
        (26, 16, 16, 3, 1),  # from batch 5 on, half of the products
        (64, 48, 48, 3, 1),
        (64, 16, 3, 3, 1),
    ],
)
def test_a_convolution_is_equal_in_each_slot(
    here, batch, side, channels, features, kernel, stride, monkeypatch
):
    if not here:  # what such processors need must be right on any
        monkeypatch.setattr(processor, "features", frozenset)
    random = np.random.default_rng(0)
    image = random.standard_normal((1, side, side, channels), np.float32)
    weights = random.standard_normal((kernel, kernel, channels, features), np.float32)
    strides, padding = (stride, stride), ((kernel // 2, (kernel - 1) // 2),) * 2

    def convolve(convolution, x):
        return convolution(x, weights, strides, padding, dimension_numbers=products.NHWC)

    ours = compilation.jit(lambda x: convolve(products.conv_general_dilated, x))
    made = np.asarray(ours(np.repeat(image, batch, axis=0)))
    np.testing.assert_array_equal(made, np.repeat(made[:1], batch, axis=0))
    wanted = convolve(jax.lax.conv_general_dilated, image)
    np.testing.assert_allclose(made[:1], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
