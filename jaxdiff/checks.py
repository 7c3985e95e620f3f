"""Checks of single values, whether a manifest's row or the command line says them.

Each takes the value's name for its message and gives the value in its own type, or raises.
"""

import math
import numbers
import re
from collections.abc import Sequence

from jaxdiff.request import MAX_SEED, SAMPLERS

MAX_TEXT_CHARACTERS = 4000
MAX_SIDE_PX = 8192
MAX_IMAGES = 1_000_000  # of one row
MAX_GUIDANCE_SCALE = 1000.0


class BadValueError(ValueError):
    """A value that cannot be used; the message names it and says what would do."""


def of_request(size_multiple: int, max_steps: int) -> dict[str, tuple]:
    """How each value of a `Request` is checked: by name the check and its arguments.

    Args:
      size_multiple, max_steps: the `Checkpoint`'s.
    """
    return {
        "prompt": (text,),
        "negative_prompt": (text,),
        "seed": (integer, 0, MAX_SEED),
        "width": (side, size_multiple),
        "height": (side, size_multiple),
        "steps": (integer, 1, max_steps),
        "guidance_scale": (guidance_scale,),
        "sampler": (choice, SAMPLERS),
    }


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


def guidance_scale(name: str, value) -> float:
    """A finite number from 0 to 1000."""
    number = math.nan
    if isinstance(value, numbers.Real | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.nan
    if not 0 <= number <= MAX_GUIDANCE_SCALE:
        raise BadValueError(f"{name} must be a number from 0 to 1000, not {shown(value)}")
    return number


def choice(name: str, value, choices: Sequence[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise BadValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
    return value


def shown(value) -> str:
    """The value as a message may quote it."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."
