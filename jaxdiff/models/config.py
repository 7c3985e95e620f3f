"""Reading a component's `config.json` into its frozen dataclass, strictly."""

import dataclasses

from jaxdiff.errors import InputError


def from_json(cls, component: str, data: dict, fixed: dict):
    """Builds the config dataclass `cls` from a parsed `config.json`.

    A key is taken if it is a field of `cls`; it may be ignored if it starts with an underscore, or
    is off (None or False); it must equal the value in `fixed` if it stands there. Any other key
    would change what the network computes, and is refused.

    Raises:
      InputError: for a key or value that this implementation does not build.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    taken = {}
    for key, value in data.items():
        if key in fields:
            taken[key] = tuple(value) if isinstance(value, list) else value
        elif key in fixed:
            if value != fixed[key]:
                raise InputError(
                    f"{component}/config.json: {key} = {value!r} is not supported "
                    f"(only {fixed[key]!r} is)"
                )
        elif not key.startswith("_") and value is not None and value is not False:
            raise InputError(f"{component}/config.json: the key {key} = {value!r} is not supported")
    try:
        return cls(**taken)
    except (TypeError, ValueError) as error:
        raise InputError(f"{component}/config.json: {error}") from error


def to_json(config, fixed: dict) -> dict:
    """The inverse of `from_json`: what diffusers and transformers read, as a plain dictionary."""
    fields = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return {**fixed, **fields}
