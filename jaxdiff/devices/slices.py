"""TPU slices and hosts with GPUs: which there are, and what their chips can do. Imports no JAX."""

import itertools
import math
import re
from dataclasses import dataclass

from jaxdiff.checks import shown
from jaxdiff.devices import gpus
from jaxdiff.devices.gpus import Gpu
from jaxdiff.errors import InputError

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = [
    "x".join(str(4 * side) for side in sides)
    for sides in itertools.combinations_with_replacement(range(1, 7), 3)
    if sides[1] <= 4
]
COUNTS = ("1", "2", "4", "8")  # of GPUs in a host
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", *CUBES)
NAMED = 8  # layouts that a message lists


@dataclass(frozen=True)
class Chip:
    """A kind of chip, with the numbers of its maker's pages.

    Attributes:
      memory_bytes: its memory.
      flops: operations per second of its matrix units in bfloat16, at their peak.
      layouts: its slices.
      hertz: the clock that the compiler's cycles are of; None if that is not known.
      gpu: if it is one, what XLA must know of it; None for a TPU.
    """

    memory_bytes: int
    flops: float
    layouts: tuple[str, ...]
    hertz: float | None = None
    gpu: Gpu | None = None


CHIPS = {
    # 197e12 = 4 matrix units * 128 * 128 * 2 operations * 1.5 GHz
    "v5e": Chip(16 * 2**30, 197e12, FLAT, 1.5e9),
    "v6e": Chip(32 * 2**30, 918e12, FLAT),
    "v5p": Chip(95 * 2**30, 459e12, DEEP),
    "a100": Chip(80 * 2**30, 312e12, COUNTS, gpu=gpus.A100),
    "h100": Chip(79 * 2**30, 989e12, COUNTS, gpu=gpus.H100),
    "h200": Chip(140 * 2**30, 989e12, COUNTS, gpu=gpus.H200),
}


@dataclass(frozen=True)
class Slice:
    """A slice of TPU chips, such as 4x4 of v5e; or the GPUs of a host, such as 8 of h100."""

    kind: str
    layout: str

    @property
    def chip(self) -> Chip:
        """What each chip can do."""
        return CHIPS[self.kind]

    @property
    def host_sides(self) -> tuple[int, int, int]:
        """How the chips of one host are laid out: the mesh of a process has these."""
        sides = _sides(self.layout)
        if self.chip.gpu is not None:
            return 1, 1, *sides
        return (*sides, 1) if sides in ((1, 1), (2, 4)) else (2, 2, 1)

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return math.prod(_sides(self.layout)) // math.prod(self.host_sides)

    @property
    def chips(self) -> int:
        """The number of chips on all hosts."""
        return math.prod(_sides(self.layout))


def parse(target: str) -> Slice:
    """Reads a target such as "tpu-v5e:2x2" or "h100:8".

    Raises:
      InputError: if it is written differently, or there is no such slice.
    """
    match = re.fullmatch(r"(tpu-)?(\w+):([0-9]+(?:x[0-9]+)*)", target)
    prefix, kind, layout = match.groups() if match else (None, "", "")
    if kind not in CHIPS or (prefix is None) == (CHIPS[kind].gpu is None):
        raise InputError(
            f"--target {shown(target)}: write it as tpu-v5e:2x2 or h100:8; the chips are "
            f"{', '.join(CHIPS)}"
        )
    layouts = CHIPS[kind].layouts
    if layout not in layouts:
        more = ", ..." if len(layouts) > NAMED else ""
        raise InputError(
            f"--target {shown(target)}: there is no such slice; {kind} has "
            f"{', '.join(layouts[:NAMED])}{more}"
        )
    return Slice(kind, layout)


def _sides(layout: str) -> tuple[int, ...]:
    return tuple(map(int, layout.split("x")))
