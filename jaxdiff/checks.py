"""Checks of single values, whether a manifest's row or the command line says them.

Each takes the value's name for its message and gives the value in its own type, or raises.
"""

import json
import math
import numbers
import re
from collections.abc import Sequence

MAX_SEED = 2**32 - 1
MAX_TEXT_CHARACTERS = 4000
MAX_SIDE_PX = 8192
MAX_IMAGES = 1_000_000  # of one row
MAX_GUIDANCE_SCALE = 1000
MAX_STEPS = 100_000  # `steps_of` knows better, once the sampler is known
MAX_CLIP_SKIP = 100
MAX_PROMPT_CHUNKS = 16
MAX_DEEP_CACHE = 100
DTYPES = ("float32", "bfloat16")
NOISES = ("jax", "torch")


class BadValueError(ValueError):
    """A value that cannot be used; the message names it and says what would do."""


def text(name: str, value) -> str:
    """A string that can be stored and tokenised, byte for byte as it came."""
    if not isinstance(value, str):
        raise BadValueError(f"{name} must be text, not {shown(value)}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise BadValueError(f"{name} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS}")
    if "\0" in value:
        raise BadValueError(f"{name} holds a NUL character")
    unicode(name, value)
    return value


def unicode(name: str, value: str) -> None:
    """Refuses what UTF-8 cannot hold."""
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        code = ord(value[problem.start])
        if 0xDC80 <= code <= 0xDCFF:  # how manifest.read marks an undecodable byte
            wrong = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        else:
            wrong = f"the lone surrogate U+{code:04X}"
        raise BadValueError(f"{name} holds {wrong}") from None


def integer(name: str, value, low: int, high: int) -> int:
    """A whole number: 7, "7", and 7.0 too, which pandas makes of a column with gaps."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", value.strip()):
        number = int(value.strip().partition(".")[0])
    elif isinstance(value, numbers.Real) and value % 1 == 0:
        number = int(value)
    if isinstance(value, bool) or not isinstance(number, int) or not low <= number <= high:
        raise BadValueError(
            f"{name} must be a whole number from {low} to {high}, not {shown(value)}"
        )
    return number


def integer_or(name: str, value, word: str, low: int, high: int) -> int | str:
    """A whole number, or the word instead of one."""
    if value == word:
        return word
    try:
        return integer(name, value, low, high)
    except BadValueError:
        raise BadValueError(
            f"{name} must be a whole number from {low} to {high}, or {word}, not {shown(value)}"
        ) from None


def side(name: str, value, multiple: int) -> int:
    """A width or height in pixels."""
    px = integer(name, value, multiple, MAX_SIDE_PX)
    if px % multiple:
        nearest = multiple * max(1, round(px / multiple))
        raise BadValueError(
            f"{name} must be a multiple of {multiple} for this model, not {px}; "
            f"{nearest} would be the nearest"
        )
    return px


def number(name: str, value, low: float, high: float) -> float:
    """A number between two others, or one of them."""
    number = math.nan
    if isinstance(value, numbers.Real | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.nan
    if not low <= number <= high:
        raise BadValueError(f"{name} must be a number from {low} to {high}, not {shown(value)}")
    return number


def scheduler(name: str, value) -> str:
    """Changes to a scheduler's config, sorted: "timestep_spacing=trailing, use_karras_sigmas=true".

    Comes as text in this form, or as a dictionary (a table in TOML).
    """
    changes = key_values(value) if isinstance(value, str) else value
    plain = {}
    for key, said in changes.items() if isinstance(changes, dict) else [("", value)]:
        plain[key] = said if isinstance(said, str) else json.dumps(said, default=repr)
        if not re.fullmatch(r"[a-z_]+", str(key)) or not re.fullmatch(r"[\w.+-]+", plain[key]):
            raise BadValueError(f'{name} must be like "key=value, key=value", not {shown(value)}')
    return ", ".join(f"{key}={said}" for key, said in sorted(plain.items()))


def key_values(text: str) -> dict:
    """What a text in the form of `scheduler` says, by key."""
    parts = (part.partition("=") for part in text.split(",") if part.strip())
    return {key.strip(): _json_or_text(said.strip()) for key, _, said in parts}


def _json_or_text(said: str):
    try:
        return json.loads(said)
    except ValueError:
        return said


def choice(name: str, value, choices: Sequence[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise BadValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
    return value


def shown(value) -> str:
    """The value as a message may quote it."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."
