"""The day of a scheduled job: `{date}` in the paths of its manifest and its output."""

import datetime
import os

from jaxdiff import checks
from jaxdiff.errors import InputError

PLACEHOLDER = "{date}"
VARIABLE = "JAXDIFF_DATE"


def filled(said: dict) -> dict:
    """Returns a job's options with its day in place of `{date}` in `manifest` and `output`.

    The day is the option `date` or else the environment variable JAXDIFF_DATE. Other braces stay
    as they are.

    Raises:
      InputError: if the day is not a date, or if it is missing where a path needs it.
    """
    dated = [name for name in ("manifest", "output") if PLACEHOLDER in said.get(name, "")]
    source, day = "--date", said.get("date")
    if day is None:
        source, day = VARIABLE, os.environ.get(VARIABLE)
    if day is not None:
        day = _checked(source, str(day))  # a job file's date is not text
    elif dated:
        name, *_ = dated
        raise InputError(
            f"--{name} {checks.shown(said[name])} needs a day: use --date YYYY-MM-DD or set "
            f"{VARIABLE}"
        )
    return said | {name: said[name].replace(PLACEHOLDER, day) for name in dated}


def _checked(source: str, day: str) -> str:
    try:
        is_date = datetime.date.fromisoformat(day).isoformat() == day  # it also reads 20261128
    except ValueError:
        is_date = False
    if not is_date:
        raise InputError(f"{source} must be a date such as 2026-11-28, not {checks.shown(day)}")
    return day
