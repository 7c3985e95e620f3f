"""What a single-file checkpoint was trained to predict, from every place that may say so.

Such a file has no scheduler config. It may flag v-prediction by an empty tensor `v_pred`, in its
metadata (Stability AI's ModelSpec: `modelspec.prediction_type`; kohya's trainer:
`ss_v_parameterization`), or in the original code's config, a YAML file of the same name beside it.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

from jaxdiff.checkpoint.regular_file import opened
from jaxdiff.errors import InputError

MAX_YAML_BYTES = 100_000  # a config has 5,000; a megabyte may take half a minute
NAMES = {  # as the places spell them, in lower case
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction"), "v_prediction"),
}


def config_beside(path: Path) -> Path | None:
    """Returns the path of the YAML file beside a checkpoint, None if there is none.

    It need not be a file that can be read.
    """
    beside = path.with_suffix(".yaml")
    return beside if os.path.lexists(beside) else None


def prediction_type(path: Path, keys: Collection[str], metadata: Mapping) -> str:
    """Returns "epsilon" or "v_prediction"; "epsilon" if nothing says otherwise.

    Args:
      path: the checkpoint.
      keys: of its tensors.
      metadata: of its header.

    Raises:
      InputError: if a place has an unsupported value, or two places contradict each other.
    """
    found = {}
    if "v_pred" in keys:
        found["its tensor v_pred"] = "v_prediction"
    for key in ("modelspec.prediction_type", "ss_v_parameterization"):
        value = str(metadata.get(key, "")).strip().lower()
        if key == "ss_v_parameterization":
            value = {"true": "v", "false": "epsilon"}.get(value, "")
        if value:
            found[f"{key} in its metadata"] = _named(path, key, value)
    if beside := config_beside(path):
        value = _parameterization(beside)
        if value is not None:
            found[beside.name] = _named(beside, "model.params.parameterization", value)
    if len(set(found.values())) > 1:
        said = ", ".join(f"{value} by {place}" for place, value in found.items())
        raise InputError(f"{path} is for {said}: keep the one that is right")
    return next(iter(found.values()), "epsilon")


def _named(path: Path, key: str, value: object) -> str:
    # The text of a list could be of any length: a YAML file may repeat one list many times over.
    said = value[:40] if isinstance(value, str) else type(value).__name__
    name = NAMES.get(said.lower())
    if name is None:
        raise InputError(f"{path}: {key} = {said!r} is not supported; use epsilon or v")
    return name


def _parameterization(path: Path) -> object:
    """Returns `model.params.parameterization` of the original code's config, None without one."""
    try:
        with opened(path) as file:
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"it has more than {MAX_YAML_BYTES} bytes")
        config = yaml.safe_load(text)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise InputError(f"{path} cannot be read as YAML ({reason}); move it away") from None
    for key in ("model", "params", "parameterization"):
        if not isinstance(config, dict):
            return None
        config = config.get(key)
    return config
