"""Strict reading of a component's `config.json` into its frozen dataclass."""

import dataclasses
import types
import typing

from jaxdiff.errors import InputError, suggestion

# Keys whose numbers may be 0 or negative; all others are sizes, counts or scales.
MAY_BE_ZERO = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("freq_shift", "latents_mean", "shift_factor"),
)


def from_json(cls, component: str, data: dict, fixed: dict):
    """Builds the config dataclass `cls` from a parsed `config.json`.

    A field of `cls` is read, and a key in `fixed` must have the value given there. Other keys are
    ignored if they start with an underscore or are off (None or False), and rejected if not, since
    they would change what the network computes.

    Raises:
      InputError: for a key or value that is not supported.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    taken = {}
    for key, value in data.items():
        if key in fields:
            taken[key] = tuple(value) if isinstance(value, list) else value
            if not _is_a(taken[key], fields[key]):
                raise InputError(f"{component}/config.json: {key} = {value!r} is not supported")
            numbers = value if isinstance(value, list) else [value]
            if key not in MAY_BE_ZERO and any(type(n) in (int, float) and n <= 0 for n in numbers):
                raise InputError(f"{component}/config.json: {key} = {value!r} must be above 0")
        elif key in fixed:
            if value != fixed[key]:
                raise InputError(
                    f"{component}/config.json: {key} = {value!r} is not supported "
                    f"(only {fixed[key]!r} is)"
                )
        elif not key.startswith("_") and value is not None and value is not False:
            raise InputError(
                f"{component}/config.json: the key {key} = {value!r} is not supported"
                f"{suggestion(key, fields)}"
            )
    try:
        return cls(**taken)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{component}/config.json: {error}") from error


def to_json(config, fixed: dict) -> dict:
    """Returns the config as diffusers and transformers read it; the inverse of `from_json`."""
    fields = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return {**fixed, **fields}


def _is_a(value, kind) -> bool:
    """Checks whether `value` has the annotated type: a plain one, `tuple[kind, ...]` or a union."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (type(None) if kind is None else kind)
