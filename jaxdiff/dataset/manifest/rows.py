"""Parses a manifest row: checks every value and fills in every default."""

import json
import numbers
from collections.abc import Sequence
from typing import NamedTuple

from jaxdiff import checks
from jaxdiff.checks import MAX_SEED, BadValueError
from jaxdiff.dataset.manifest import columns
from jaxdiff.dataset.settings import Settings
from jaxdiff.request import IMAGE_FIELDS, Request, derived_seed

MAX_ID_CHARACTERS = 500
JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Row(NamedTuple):
    """One accepted row.

    Attributes:
      request: of its first image; the others differ in their seeds. Its images are addresses.
      seeds: of its images; None if they are derived from its id.
      metadata: its other columns, as a JSON object.
      place: its file and line.
    """

    id: str
    request: Request
    num_images: int
    seeds: Sequence[int] | None
    metadata: str
    place: tuple[str, int]


class RowParser:
    """Parses the rows of a manifest."""

    def __init__(self, settings: Settings, request_checks: dict, needs_prompt: bool = True):
        """Prepares what all rows share.

        Args:
          settings: the job's settings, which supply missing values.
          request_checks: as `request.field_checks` returns them.
          needs_prompt: whether a row without a prompt cannot be used.
        """
        self._settings, self._needs_prompt = settings, needs_prompt
        of_images = {name: (each.check, *each.arguments) for name, each in IMAGE_FIELDS.items()}
        every = request_checks | of_images
        self._checks = {name: (check, arguments) for name, (check, *arguments) in every.items()}
        of_job = {name: getattr(settings, name) for name in request_checks if name != "prompt"}
        self._defaults = vars(Request(prompt="")) | of_job

    def parse(self, values: dict, row_number: int, place: tuple[str, int]) -> Row:
        """Parses one row.

        Args:
          values: by column, as in `readers.Entry`; None counts as missing.
          row_number: the id of a row without one.
          place: its file and line.

        Raises:
          BadValueError: for a row that cannot be used.
        """
        settings = self._settings
        known, copied = columns.sorted_out(tuple(values), settings.prompt_column)
        said = {means: values[name] for means, name in known if values[name] is not None}
        if self._needs_prompt and _is_blank(said.get("prompt")):
            if "prompt" in dict(known):
                raise BadValueError("the prompt is empty or missing")
            raise BadValueError(f"the row {columns.no_prompt(values, settings.prompt_column)}")
        wanted = self._defaults.copy()
        for name, value in said.items():
            if name in self._checks:
                check, arguments = self._checks[name]
                wanted[name] = check(name, value, *arguments)
        num_images, seeds = _seeds(said, settings.num_images)
        row_id = _id(said.get("id", row_number))
        wanted["seed"] = derived_seed(settings.seed, row_id, 0) if seeds is None else seeds[0]
        metadata = _json({name: values[name] for name in copied})
        request = Request.of_checked(wanted)
        return Row(row_id, request, num_images, seeds, metadata, place)


def _seeds(said: dict, default_count: int) -> tuple[int, Sequence[int] | None]:
    """Returns the number of images and their seeds, which are None if the row has none."""
    count = None
    if "num_images" in said:
        count = checks.integer("num_images", said["num_images"], 1, checks.MAX_IMAGES)
    if "seeds" in said:
        if "seed" in said:
            raise BadValueError("the row has both seed and seeds; keep one")
        seeds = _seed_list(said["seeds"])
        if count not in (None, len(seeds)):
            raise BadValueError(f"the row has {len(seeds)} seeds, but num_images is {count}")
        return len(seeds), seeds
    count = count or default_count
    if "seed" not in said:
        return count, None
    seed = checks.integer("seed", said["seed"], 0, MAX_SEED)
    if seed + count - 1 > MAX_SEED:
        raise BadValueError(f"seed {seed} and {count} images exceed the largest seed, {MAX_SEED}")
    return count, range(seed, seed + count)


def _seed_list(value) -> tuple[int, ...]:
    if isinstance(value, str):
        value = value.strip("[] ").replace(",", " ").split()
    if not isinstance(value, list) or not 1 <= len(value) <= checks.MAX_IMAGES:
        raise BadValueError(f"seeds must be a list of whole numbers, not {checks.shown(value)}")
    return tuple(checks.integer("each seed of seeds", seed, 0, MAX_SEED) for seed in value)


def _id(value) -> str:
    is_number = not isinstance(value, str | bool) and isinstance(value, numbers.Real)
    if is_number and value % 1 == 0:
        value = str(int(value))  # pandas turns 7 into 7.0 in a column with gaps
    value = checks.text("id", value)
    if not value:
        raise BadValueError("id is empty; omit it to use the row's number")
    if len(value) > MAX_ID_CHARACTERS:
        raise BadValueError(f"id has {len(value)} characters; at most {MAX_ID_CHARACTERS}")
    return value


def _is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _json(others: dict) -> str:
    if not others:
        return "{}"
    try:
        encoded = _encoded(others)
    except (RecursionError, TypeError, ValueError) as problem:
        name = next(name for name, value in others.items() if not _is_json(value))
        raise BadValueError(f"column {checks.shown(name)}: {problem}; convert it to text") from None
    checks.unicode("an extra column", encoded)
    return encoded


def _encoded(others: dict) -> str:
    if {*map(type, others.values())} != {str}:
        return JSON.encode(others)
    # The encoder starts slowly for an object, but not for a text.
    pairs = [f"{JSON.encode(name)}:{JSON.encode(text)}" for name, text in others.items()]
    return f"{{{','.join(pairs)}}}"


def _is_json(value) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (RecursionError, TypeError, ValueError):
        return False
    return True
