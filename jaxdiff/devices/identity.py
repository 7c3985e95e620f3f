"""Describes values and functions, so that equal descriptions mean equal traced programs."""

import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import numpy as np

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype)
NAMED = (type, types.BuiltinFunctionType, np.ufunc)


def identity(value: Any) -> str:
    """Describes a value with everything that tracing it may depend on, but for the source code.

    A function is described by its name, its place in the source, and what it holds: the values of
    its closure, defaults and partial arguments.

    Args:
      value: a function, or a value that one holds.

    Raises:
      TypeError: for a type that is not known here. To guess could mean to take one program for
        another.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, NAMED):
        return f"{getattr(value, '__module__', '')}.{value.__name__}"
    if isinstance(value, functools.partial):
        return f"partial({_all(value.func, *value.args)} {identity(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"method({_all(value.__func__, value.__self__)})"
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        # Two lambdas of one function have the same name, but not the same place.
        place = hashlib.sha256(repr([*value.__code__.co_positions()]).encode()).hexdigest()
        parts = [place, *held, value.__defaults__, value.__kwdefaults__]
        return f"{value.__module__}.{value.__qualname__}({_all(*parts)})"
    if isinstance(value, Mapping):
        items = (f"{identity(key)}: {identity(each)}" for key, each in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(identity, value)))}}}"
    if isinstance(value, tuple | list):
        return f"{type(value).__qualname__}({_all(*value)})"
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return f"array({array.shape} {array.dtype} {digest})"
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"shape({value.shape} {value.dtype} {value.sharding})"
    if isinstance(value, jax.sharding.Mesh):
        device = value.devices.flat[0]
        return f"{value} of {device.platform} {device.device_kind}"
    if is_dataclass(value):
        parts = (f"{field.name}={identity(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(parts)})"
    raise TypeError(f"no program can be identified by {type(value)}")


def _all(*values: Any) -> str:
    return ", ".join(map(identity, values))
