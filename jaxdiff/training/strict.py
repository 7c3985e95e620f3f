"""Parses TOML tables strictly into frozen dataclasses."""

import dataclasses
import types
import typing
from typing import Literal

from jaxdiff.errors import InputError, suggestion


def build(cls, data: dict, where: str):
    """Makes a dataclass of a parsed table.

    Args:
      cls: the dataclass, whose annotations say what each key may be.
      data: the table.
      where: what messages begin with: the file and the keys above.

    Raises:
      InputError: for an unknown, missing or mistyped key.
    """
    kinds = typing.get_type_hints(cls)
    for key in data:
        if key not in kinds:
            hint = suggestion(key, kinds) or f"; known keys: {', '.join(sorted(kinds))}"
            raise InputError(f"{where}{key}: unknown key{hint}")
    values = {}
    for spec in dataclasses.fields(cls):
        if spec.name in data:
            values[spec.name] = _value(kinds[spec.name], data[spec.name], where + spec.name)
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}{spec.name} is missing")
    return cls(**values)


def _value(kind, value, where: str):
    """Checks that `value` is of this kind; turns tables into dataclasses and arrays into tuples."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for one in kinds:
        if dataclasses.is_dataclass(one) and isinstance(value, dict):
            return build(one, value, f"{where}.")
        if typing.get_origin(one) is Literal and value in typing.get_args(one):
            return value
        if typing.get_origin(one) is tuple and isinstance(value, list):
            item = typing.get_args(one)[0]
            return tuple(_value(item, part, f"{where}[{i}]") for i, part in enumerate(value))
        if one is float and type(value) is int:
            return float(value)
        if isinstance(one, type) and type(value) is one:
            return value
    wanted = " or ".join(_description(one) for one in kinds if one is not types.NoneType)
    raise InputError(f"{where} must be {wanted}, not {value!r}")


def _description(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "an array"
    if dataclasses.is_dataclass(kind) or kind is dict:
        return "a table"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
