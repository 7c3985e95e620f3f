"""Strict reading of a component's `config.json` into its frozen dataclass."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from jaxdiff.checks import shown
from jaxdiff.errors import InputError, suggestion

# Keys whose numbers may be 0 or negative; all others are sizes, counts or scales.
MAY_BE_ZERO = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("dual_attention_layers", "freq_shift", "fullatt_block_indexes", "latents_mean"),
    *("num_single_layers", "shift_factor"),
)
MAY_BE_EMPTY = ("dual_attention_layers",)  # keys whose list may be empty
MOST = 2**31 - 1  # of a whole number: of a size, and of a token's id on the device
SMALLEST, LARGEST = 1e-30, 1e30  # magnitudes of other numbers; with their inverses in float32
MAX_REASON_CHARACTERS = 300


def from_json(cls, component: str, data: dict, fixed: Mapping[str, Any]):
    """Builds the config dataclass `cls` from a parsed `config.json`.

    A field of `cls` is read, and a key in `fixed` must have the value given there. Other keys are
    ignored if they start with an underscore or are off (None or False), and rejected if not, since
    they would change what the network computes.

    Raises:
      InputError: for a key or value that is not supported.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    taken = {}
    file = f"{component}/config.json"
    for key, value in data.items():
        if key in fields:
            if not _is_a(value, fields[key]) or (value == [] and key not in MAY_BE_EMPTY):
                raise InputError(f"{file}: {key} = {shown(value)} is not supported")
            taken[key] = _tuples(value)
            numbers = [n for n in _flat(value) if type(n) in (int, float)]
            if key not in MAY_BE_ZERO and any(n <= 0 for n in numbers):
                raise InputError(f"{file}: {key} = {shown(value)} must be above 0")
            if not all(map(_fits, numbers)):
                raise InputError(
                    f"{file}: {key} = {shown(value)} is too large, too small or no number; copy "
                    "the checkpoint again"
                )
        elif key in fixed:
            if value != fixed[key]:
                raise InputError(
                    f"{file}: {key} = {shown(value)} is not supported (only {fixed[key]!r} is)"
                )
        elif not key.startswith("_") and value is not None and value is not False:
            raise InputError(
                f"{file}: the key {shown(key)[1:-1]} = {shown(value)} is not supported"
                f"{suggestion(key, fields)}"
            )
    try:
        return cls(**taken)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{file}: {str(error)[:MAX_REASON_CHARACTERS]}") from error


class ComponentConfig:
    """Base of a component's config dataclass, whose fields are keys of its `config.json`.

    Attributes:
      component: the name of the component's folder.
      fixed: keys of which only one value is supported.
      ignored: keys without effect on what the network computes.
    """

    component: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = {}
    ignored: ClassVar[Collection[str]] = ()

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads a parsed `config.json`; raises InputError for what is not supported."""
        kept = {key: value for key, value in data.items() if key not in cls.ignored}
        return from_json(cls, cls.component, kept, cls.fixed)

    def to_json(self) -> dict:
        """Returns the `config.json` that diffusers and transformers read."""
        fields = dataclasses.asdict(self)
        return {**self.fixed, **{key: _lists(value) for key, value in fields.items()}}


def _tuples(value):
    """Returns a parsed value with tuples for its lists and for the lists in them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _lists(value):
    """Undoes `_tuples`."""
    return list(map(_lists, value)) if isinstance(value, tuple) else value


def _flat(value) -> list:
    """Returns what is in a list and in the lists in it, or the value alone."""
    return [leaf for each in value for leaf in _flat(each)] if isinstance(value, list) else [value]


def _is_a(value, kind) -> bool:
    """Checks whether `value` has the annotated type: a plain one, `tuple[kind, ...]` or a union.

    A list may stand for a tuple.
    """
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(_is_a(v, each) for v in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (type(None) if kind is None else kind)


def _fits(number: int | float) -> bool:
    """Checks whether the devices can compute with a number: not so NaN and infinity."""
    if type(number) is int:
        return -MOST <= number <= MOST
    return number == 0 or SMALLEST <= abs(number) <= LARGEST
