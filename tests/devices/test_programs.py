"""Programs are traced once for all processes, and again if anything that they depend on differs."""

from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.devices import parallel
from jaxdiff.devices.identity import identity
from jaxdiff.devices.programs import Program, seconds_waited, wait

NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)
TRACED = []  # by the function below


class Both(NamedTuple):
    left: object
    right: object


def scaled(factor, tree: dict, x, *, power: int = 1):
    TRACED.append(factor)
    return {"y": factor * (x + tree["bias"]) ** power}


def run(function, *arguments, axes=(None, 0), **static) -> tuple:
    """Runs a new program; returns its result and how often it was traced."""
    before = len(TRACED)
    program = Program(function, parallel.make_mesh("data=1"), axes)
    arguments = arguments or ({"bias": np.float32(1)}, NUMBERS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    expected = program.result(*shapes, **static)
    result = wait({"it": program.compile(*shapes, **static)}, "it")(*arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), expected) == jax.tree.map(
        lambda x: (x.shape, x.dtype), result
    )
    return result, len(TRACED) - before


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_program_is_traced_once():
    for traced in (1, 0):
        result, times = run(partial(scaled, 2.0))
        assert times == traced
        np.testing.assert_array_equal(result["y"], 2 * (NUMBERS + 1))


@pytest.mark.parametrize(
    ("function", "arguments", "how"),
    [
        (partial(scaled, 3.0), (), {}),
        (partial(scaled, 2.0), (), {"power": 2}),
        (partial(scaled, 2.0), ({"bias": np.float32(1)}, NUMBERS[:1]), {}),
        (partial(scaled, 2.0), ({"bias": np.float32(1)}, NUMBERS.astype(np.int32)), {}),
        (partial(scaled, 2.0), ({"bias": np.float32(1), "more": np.float32(0)}, NUMBERS), {}),
        (partial(scaled, 2.0), (), {"axes": (None, None)}),
    ],
)
def test_a_program_that_differs_is_traced_again(function, arguments, how):
    run(partial(scaled, 2.0))
    result, times = run(function, *arguments, **how)
    assert times == 1
    (factor,) = function.args
    x = arguments[1] if arguments else NUMBERS
    np.testing.assert_array_equal(result["y"], factor * (x + 1.0) ** how.get("power", 1))


def test_a_setting_of_jax_is_a_difference():
    run(partial(scaled, 2.0))
    with jax.default_matmul_precision("highest"):
        _, times = run(partial(scaled, 2.0))
    assert times == 1


def test_a_failed_program_raises_where_it_is_awaited():
    def wrong(x):
        raise ZeroDivisionError("in the function")

    program = Program(wrong, parallel.make_mesh("data=1"), (None,))
    programs = {"wrong": program.compile(1.0 * NUMBERS)}
    with pytest.raises(ZeroDivisionError, match="in the function"):
        wait(programs, "wrong")
    assert programs == {}  # it can be retried


def holding(value):
    def function(x):
        return x, value

    return function


def defaulting(value):
    def function(x, y=value):
        return x, y

    return function


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (True, 1),
        ("a", b"a"),
        (0.1, 0.1 + 1e-16),
        (jnp.float32, jnp.bfloat16),
        ((1, 2), [1, 2]),
        (Both(1, 2), Both(2, 1)),
        ({"a": 1}, MappingProxyType({"b": 1})),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros(2), np.ones(2)),
        (len, max),
        (np.add, np.multiply),
        (jax.ShapeDtypeStruct((1,), np.float32), jax.ShapeDtypeStruct((1,), np.int8)),
    ],
)
def test_functions_that_hold_other_values_have_other_identities(one, other):
    for hold in (holding, defaulting, lambda value: partial(scaled, value), lambda value: value):
        assert identity(hold(one)) == identity(hold(one))
        assert identity(hold(one)) != identity(hold(other))


def test_functions_of_the_same_name_have_other_identities():
    one, other = (lambda x: x + 1), (lambda x: x + 2)  # a choice between them may be held nowhere
    assert one.__qualname__ == other.__qualname__
    assert identity(one) == identity(one)
    assert identity(one) != identity(other)


def test_what_is_not_known_has_no_identity():
    with pytest.raises(TypeError, match="no program can be identified"):
        identity(holding(object()))


def test_compiling_counts_where_it_is_waited_for():
    program = Program(partial(scaled, 17.0), parallel.make_mesh("data=1"), (None, 0))
    before = seconds_waited()
    compiled = program.compile({"bias": np.float32(1)}, NUMBERS)
    compiled.result()  # as if the caller had done something else meanwhile
    assert seconds_waited() == before
    jax.jit(lambda x: x * 17.0 + 3.0)(NUMBERS)  # as noise is drawn
    assert seconds_waited() > before
