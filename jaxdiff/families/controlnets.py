"""Compares ControlNets with the model that they are to steer. Imports no JAX."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxdiff.checks import shown
from jaxdiff.errors import InputError


def refuse_other_class(config: Mapping[str, Any], needed: Collection[str]) -> None:
    """Raises InputError unless a parsed config is of one of the classes `needed`."""
    found = config.get("_class_name")
    if found not in needed:
        raise InputError(
            f"the ControlNet is a {found}, and this model takes a {' or '.join(needed)}; use one "
            "that was trained for this model"
        )


def refuse_misfit(
    model: Mapping[str, Any], controlnet: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Raises InputError if the configs of a model's denoiser and a ControlNet differ in a key.

    A key that one of them lacks is not compared.
    """
    for key in keys:
        if key in model and key in controlnet and model[key] != controlnet[key]:
            raise InputError(
                f"the ControlNet's {key} = {shown(controlnet[key])} does not fit the model, which "
                f"has {shown(model[key])}; use one that was trained for this model"
            )
