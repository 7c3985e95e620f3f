"""Reads and writes the JSON files of a checkpoint."""

import json
from pathlib import Path

from jaxdiff.checkpoint.regular_file import opened
from jaxdiff.errors import InputError

MAX_JSON_BYTES = 64_000_000
MAX_DEPTH = 100  # of lists in lists: what reads or shows a deeper value might recurse too deeply


def read_json(path: Path) -> dict:
    """Reads the JSON object in a file; raises InputError if it does not contain one."""
    try:
        with opened(path) as file:
            value = json.loads(file.read(MAX_JSON_BYTES))
        if not _is_shallow(value):
            raise ValueError("nested too deeply")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the checkpoint again") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; copy it again")
    return value


def _is_shallow(value: object) -> bool:
    level = [[value]]
    for _ in range(MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for part in inner for each in part if isinstance(each, dict | list)]
        if not level:
            return True
    return False


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object as diffusers does: indented and with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
