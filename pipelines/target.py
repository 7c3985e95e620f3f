"""What a dry run compiles for, and what it computes the bill with, from the command line."""

from dataclasses import dataclass

from jaxdiff import checks
from jaxdiff.devices import slices
from jaxdiff.errors import InputError

UTILISATION = 0.4
# As in `generate_help.HELP`.
HELP = {
    "target": (
        "SLICE",
        "with --dry-run: compile the programs for this TPU slice, such as tpu-v5e:2x2, or these "
        "GPUs, such as h100:8, and print whether they fit; takes minutes and no such chip (see "
        "docs/tpu.md)",
    ),
    "utilisation": (
        "SHARE",
        f"the share of the chips' peak that hours are computed with (default: {UTILISATION})",
    ),
    "price_per_chip_hour": (
        "PRICE",
        "with --dry-run: what a chip costs for an hour, to print the bill",
    ),
}


@dataclass(frozen=True)
class Target:
    """What `--target` and `--utilisation` say.

    Attributes:
      name: of the slice, such as "tpu-v5e:2x2".
      utilisation: the share of the chips' peak that the job is taken to reach.
    """

    name: str
    utilisation: float = UTILISATION


def parse(said: dict) -> Target | None:
    """Returns the target of a command's options; None without one.

    Raises:
      InputError: if there is no such slice, a number is out of range, or `--dry-run` is missing.
    """
    name = said.get("target")
    if name is None and "utilisation" in said:
        raise InputError("--utilisation needs --target, such as tpu-v5e:2x2")
    if name is None:
        return None
    _check_dry_run("target", said)
    slices.parse(name)
    return Target(name, _number("utilisation", said.get("utilisation", UTILISATION), 0.01, 1))


def price(said: dict) -> float | None:
    """Returns what a chip costs for an hour, in any currency; None for no bill.

    Raises:
      InputError: if it is out of range, or `--dry-run` is missing.
    """
    if "price_per_chip_hour" not in said:
        return None
    _check_dry_run("price_per_chip_hour", said)
    return _number("price_per_chip_hour", said["price_per_chip_hour"], 0, 10**6)


def _check_dry_run(name: str, said: dict) -> None:
    if not said.get("dry_run"):
        option = name.replace("_", "-")
        raise InputError(f"--{option} is for a dry run: add --dry-run, or leave it out")


def _number(name: str, value, least: float, most: float) -> float:
    try:
        return checks.number(f"--{name.replace('_', '-')}", value, least, most)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None
