"""Reads the text of a compiled TPU program: exchanges, kernels, estimated time. Imports no JAX."""

import re
from collections import Counter
from typing import NamedTuple

# A line of XLA's text is an instruction. The steps of one exchange share a channel.
EXCHANGE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    r".*?\bchannel_id=(\d+)"
)
KERNEL = 'custom_call_target="tpu_custom_call"'  # Pallas'
BEGIN = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")  # of a computation
LOOP = re.compile(r" while\(.*?\bcondition=%([\w.-]+), body=%([\w.-]+)")
LIMIT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")  # of a loop's counter, in its condition
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Cycles(NamedTuple):
    """The compiler's estimate of a program's time, in cycles of one chip.

    Attributes:
      turns: how often the sampling loop is run through; 0 if the compiler unrolled it.
      sampling: the cycles of all turns.
      rest: the others.
    """

    turns: int
    sampling: int
    rest: int


def exchanges(text: str) -> dict[str, int]:
    """Counts the exchanges between devices, by kind; one within a loop counts once."""
    found = {each.groups() for each in map(EXCHANGE.search, text.splitlines()) if each}
    return dict(sorted(Counter(kind for kind, _ in found).items()))


def kernels(text: str) -> int:
    """Counts the calls of Pallas' kernels; one within a loop counts once."""
    return text.count(KERNEL)


def cycles(text: str, sampling: str) -> Cycles:
    """Adds up the cycles that the compiler estimated for each instruction.

    It estimates none for Pallas' kernels.

    Args:
      text: the program's.
      sampling: the end of the operation's name of the sampling loop, such as "sample/while".
    """
    bodies, entry = _computations(text)

    def total(name: str) -> int:
        own = sum(int(each[1]) for each in map(CYCLES.search, bodies[name]) if each)
        return own + sum(turns * total(body) for _, turns, body in loops(name))

    def loops(name: str) -> list[tuple[str, int, str]]:
        """Returns the line, the number of turns and the body of each loop in a computation."""
        found = []
        for line in bodies[name]:
            if loop := LOOP.search(line):
                condition, body = loop.groups()
                limits = [int(each[1]) for each in map(LIMIT.search, bodies[condition]) if each]
                found.append((line, max(limits, default=1), body))
        return found

    of_sampling = [
        (turns, turns * total(body)) for line, turns, body in loops(entry) if f'{sampling}"' in line
    ]
    turns, in_loop = (sum(column) for column in zip((0, 0), *of_sampling, strict=True))
    return Cycles(turns, in_loop, total(entry) - in_loop)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the program's own."""
    bodies, lines, entry = {}, [], ""
    for line in text.splitlines():
        if begin := BEGIN.match(line):
            lines = bodies[begin[2]] = []
            entry = begin[2] if begin[1] else entry
        lines.append(line)
    return bodies, entry
