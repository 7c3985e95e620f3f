"""Reads and writes the JSON files of a checkpoint."""

import json
from pathlib import Path

from jaxdiff.checkpoint.regular_file import opened
from jaxdiff.errors import InputError

MAX_JSON_BYTES = 64_000_000


def read_json(path: Path) -> dict:
    """Reads the JSON object in a file; raises InputError if it does not contain one."""
    try:
        with opened(path) as file:
            value = json.loads(file.read(MAX_JSON_BYTES))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the checkpoint again") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; copy it again")
    return value


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object as diffusers does: indented and with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
