"""The TPU slice that a dry run compiles for, from the command line."""

from dataclasses import dataclass

from jaxdiff import checks
from jaxdiff.devices import slices
from jaxdiff.errors import InputError

UTILISATION = 0.4
# As in `generate_options.HELP`.
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
    "price_per_chip_hour": ("PRICE", "what a chip costs for an hour, to print the bill"),
}


@dataclass(frozen=True)
class Target:
    """What `--target` and the options of its bill say.

    Attributes:
      name: of the slice, such as "tpu-v5e:2x2".
      utilisation: the share of the chips' peak that the job is taken to reach.
      price: of a chip for an hour, in any currency; None for no bill.
    """

    name: str
    utilisation: float = UTILISATION
    price: float | None = None


def parse(said: dict) -> Target | None:
    """Returns the target of a command's options; None without one.

    Raises:
      InputError: if there is no such slice, a number is out of range, or `--dry-run` is missing.
    """
    name, price = said.get("target"), said.get("price_per_chip_hour")
    for other in ("price_per_chip_hour", "utilisation"):
        if name is None and other in said:
            raise InputError(f"--{other.replace('_', '-')} needs --target, such as tpu-v5e:2x2")
    if name is None:
        return None
    if not said.get("dry_run"):
        raise InputError("--target is for a dry run: add --dry-run, or leave it out")
    slices.parse(name)
    try:
        utilisation = said.get("utilisation", UTILISATION)
        utilisation = checks.number("--utilisation", utilisation, 0.01, 1)
        if price is not None:
            price = checks.number("--price-per-chip-hour", price, 0, 10**6)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None
    return Target(name, utilisation, price)
