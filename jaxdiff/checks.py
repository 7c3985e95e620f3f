"""Checks of single values from a manifest row or the command line.

Each check takes the value's name for its message and returns the value in its own type, or raises
BadValueError.
"""

import json
import math
import numbers
import re
from collections.abc import Sequence

MAX_SEED = 2**32 - 1
MAX_TEXT_CHARACTERS = 4000
MAX_SIDE_PX = 8192
MAX_IMAGES = 1_000_000  # per row
MAX_GUIDANCE_SCALE = 1000
MAX_STEPS = 100_000  # `scheduler_config.check_steps` applies the sampler's limit
MAX_CLIP_SKIP = 100
MAX_PROMPT_CHUNKS = 16
MAX_DEEP_CACHE = 100
DTYPES = ("float32", "bfloat16")
NOISES = ("jax", "torch")
SWITCH = ("on", "off")
PREPROCESSORS = ("none", "canny")
WEIGHTS = ("full", "int8", "fp8", "w8a8")
PLACES = ("device", "unload", "host")
MAX_MARGIN_PX = 4096
MAX_CONTROLS = 8
MAX_CONTROL_MODE = 99  # each union ControlNet has its own limit
MARGINS = ("left", "top", "right", "bottom")


class BadValueError(ValueError):
    """A value that cannot be used; the message names it and the allowed values."""


def text(name: str, value) -> str:
    """Returns a string unchanged if it can be stored and tokenised."""
    if not isinstance(value, str):
        raise BadValueError(f"{name} must be text, not {shown(value)}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise BadValueError(f"{name} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS}")
    if "\0" in value:
        raise BadValueError(f"{name} contains a NUL character")
    unicode(name, value)
    return value


def unicode(name: str, value: str) -> None:
    """Rejects text that UTF-8 cannot encode."""
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        code = ord(value[problem.start])
        if 0xDC80 <= code <= 0xDCFF:  # how manifest.read marks an undecodable byte
            wrong = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        else:
            wrong = f"the lone surrogate U+{code:04X}"
        raise BadValueError(f"{name} contains {wrong}") from None


def integer(name: str, value, low: int, high: int) -> int:
    """Returns a whole number from 7, "7" or 7.0 (as pandas stores it in a column with gaps)."""
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
    """Returns a whole number, or `word` if the value is that word."""
    if value == word:
        return word
    try:
        return integer(name, value, low, high)
    except BadValueError:
        raise BadValueError(
            f"{name} must be a whole number from {low} to {high}, or {word}, not {shown(value)}"
        ) from None


def side(name: str, value, multiple: int, largest: int) -> int:
    """Returns a width or height in pixels."""
    px = integer(name, value, multiple, largest)
    if px % multiple:
        nearest = multiple * max(1, round(px / multiple))
        raise BadValueError(
            f"{name} must be a multiple of {multiple} for this model, not {px}; "
            f"the nearest is {nearest}"
        )
    return px


def number(name: str, value, low: float, high: float) -> float:
    """Returns a number from `low` to `high`, inclusive."""
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
    """Returns changes to a scheduler's config as text, sorted by key.

    Accepts text like "timestep_spacing=trailing, use_karras_sigmas=true" or a dictionary (a table
    in TOML).
    """
    changes = key_values(value) if isinstance(value, str) else value
    plain = {}
    for key, said in changes.items() if isinstance(changes, dict) else [("", value)]:
        plain[key] = said if isinstance(said, str) else json.dumps(said, default=repr)
        if not re.fullmatch(r"[a-z_]+", str(key)) or not re.fullmatch(r"[\w.+-]+", plain[key]):
            hint = ""
            if isinstance(value, str) and "=" not in value:
                hint = f"; to choose a sampler, use {name.replace('scheduler', 'sampler')}"
            raise BadValueError(
                f'{name} must have the form "key=value, key=value", not {shown(value)}{hint}'
            )
    return ", ".join(f"{key}={said}" for key, said in sorted(plain.items()))


def layers(name: str, value) -> str:
    """Returns numbers of layers as text, in order and once each; accepts text or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list) else [None]
    said = [str(part).strip() for part in parts if str(part).strip()]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) for part in said):
        raise BadValueError(f'{name} must have the form "7, 8, 9", not {shown(value)}')
    return ", ".join(map(str, sorted(set(map(int, said)))))


def texts(name: str, value) -> tuple[str, ...]:
    """Returns several texts, from a list, a JSON list or one text."""
    return tuple(text(name, part) for part in _several(name, value))


def numbers_in(name: str, value, low: float, high: float) -> tuple[float, ...]:
    """Returns several numbers from `low` to `high`, from a list, a JSON list or one number."""
    return tuple(number(name, part, low, high) for part in _several(name, value))


def integers_in(name: str, value, low: int, high: int) -> tuple[int, ...]:
    """Returns several whole numbers in the same way."""
    return tuple(integer(name, part, low, high) for part in _several(name, value))


def _several(name: str, value) -> list:
    parts = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        parts = _json_or_text(value)
    parts = [*parts] if isinstance(parts, list | tuple) else [parts]
    if not 1 <= len(parts) <= MAX_CONTROLS:
        raise BadValueError(f"{name} must be 1 to {MAX_CONTROLS} values, not {len(parts)}")
    return parts


def margins(name: str, value) -> tuple[int, int, int, int]:
    """Returns four widths in pixels, not all 0, from "64,0,64,0" or {"left": 64, "right": 64}."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _json_or_text(value)
    if isinstance(value, dict):
        said = {side: 0 if px is None else px for side, px in value.items()}
        if unknown := said.keys() - set(MARGINS):
            raise BadValueError(
                f"{name} has {shown(sorted(unknown)[0])}; it may have {', '.join(MARGINS)}"
            )
        parts = [said.get(side, 0) for side in MARGINS]
    else:
        parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != len(MARGINS):
        form = "left,top,right,bottom"
        raise BadValueError(f'{name} must have the form "{form}", not {shown(value)}')
    px = tuple(integer(f"each side of {name}", part, 0, MAX_MARGIN_PX) for part in parts)
    if not any(px):
        raise BadValueError(f"{name} adds nothing; give one side a width in pixels")
    return px


def key_values(text: str) -> dict:
    """Parses text in the form of `scheduler` into a dictionary."""
    parts = (part.partition("=") for part in text.split(",") if part.strip())
    return {key.strip(): _json_or_text(said.strip()) for key, _, said in parts}


def _json_or_text(said: str):
    try:
        return json.loads(said)
    except ValueError:
        return said


def choice(name: str, value, choices: Sequence[str]) -> str:
    """Returns the value if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise BadValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
    return value


def shown(value) -> str:
    """Returns the value for a message: quoted, in ASCII, at most 60 characters."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."


def printable(text: str) -> str:
    """Escapes line breaks and control characters, which a terminal would obey, as in "\\x1b"."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """Makes an object, as `json` does; but of two equal keys, `json` would drop the first."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} appears twice")
    return values
