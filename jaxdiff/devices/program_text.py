"""Reads the text of a compiled TPU program: exchanges, kernels, estimated time. Imports no JAX."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

# A line of XLA's text is an instruction. The steps of one exchange share a channel.
EXCHANGE = re.compile(
    r" = (?P<type>.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?P<start>-start)?\(.*?\bchannel_id=(?P<channel>\d+)"
)
SCATTERED = "all-reduce-scatter"  # a computation of TPUs: each chip keeps its part of the sum
HOLDS_OPERANDS = ("all-gather", "collective-permute")  # before the results, in the start's type
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]+)\]")  # the bits of a number, the sides
CALLS = re.compile(r"\bcalls=%([\w.-]+)")
KERNEL = 'custom_call_target="tpu_custom_call"'  # Pallas'
BEGIN = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")  # of a computation
LOOP = re.compile(r" while\(.*?\bcondition=%([\w.-]+), body=%([\w.-]+)")
LIMIT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")  # of a loop's counter, in its condition
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Totals(NamedTuple):
    """What all instructions of a program add up to, within its sampling loop and outside of it.

    Attributes:
      turns: how often the sampling loop is run through; 0 if the compiler unrolled it.
      sampling: the total of all turns.
      rest: the total of all else.
    """

    turns: int
    sampling: int
    rest: int


class _Exchange(NamedTuple):
    kind: str
    channel: str
    size: int  # bytes


def exchanges(text: str) -> dict[str, int]:
    """Counts the exchanges between devices, by kind; one within a loop counts once."""
    bodies, _ = _computations(text)
    found = {each[:2] for name, lines in bodies.items() for each in _exchanges(name, lines)}
    return dict(sorted(Counter(kind for kind, _ in found).items()))


def exchanged_bytes(text: str, sampling: str) -> Totals:
    """Adds up what a chip receives from others, as bytes of the exchanges' results.

    All-reduces count twice: they gather what they have summed. Of n chips, each has an nth of the
    results itself, so this is at most twice too much.

    Args:
      text: the program's.
      sampling: as for `cycles`.
    """
    return _totals(text, sampling, _received)


def _received(bodies: dict[str, list[str]], name: str) -> int:
    called = [each[1] for each in map(CALLS.search, bodies[name]) if each]
    found = [_exchanges(each, bodies[each]) for each in (name, *called)]
    return sum({each.channel: each.size for each in itertools.chain(*found)}.values())


def _exchanges(computation: str, lines: list[str]) -> list[_Exchange]:
    found = []
    for each in filter(None, map(EXCHANGE.search, lines)):
        kind, arrays = each["kind"], ARRAY.findall(each["type"])
        if kind == "all-reduce" and computation.startswith(SCATTERED):
            kind = "reduce-scatter"
        if each["start"] and kind in HOLDS_OPERANDS:
            arrays = arrays[len(arrays) // 2 :]
        size = sum(math.prod(map(int, of.split(","))) * int(bits or 8) // 8 for bits, of in arrays)
        found.append(_Exchange(kind, each["channel"], size * (1 + (kind == "all-reduce"))))
    return found


def kernels(text: str) -> int:
    """Counts the calls of Pallas' kernels; one within a loop counts once."""
    return text.count(KERNEL)


def cycles(text: str, sampling: str) -> Totals:
    """Adds up the cycles of one chip that the compiler estimated for each instruction.

    It estimates none for Pallas' kernels.

    Args:
      text: the program's.
      sampling: the end of the operation's name of the sampling loop, such as "sample/while".
    """
    return _totals(text, sampling, _estimated)


def _estimated(bodies: dict[str, list[str]], name: str) -> int:
    return sum(int(each[1]) for each in map(CYCLES.search, bodies[name]) if each)


def _totals(text: str, sampling: str, measure: Callable[[dict, str], int]) -> Totals:
    """Adds up what `measure` finds in each computation, once for each of its runs."""
    bodies, entry = _computations(text)

    def total(name: str) -> int:
        return measure(bodies, name) + sum(turns * total(body) for _, turns, body in loops(name))

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
    return Totals(turns, in_loop, total(entry) - in_loop)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the program's own."""
    bodies, lines, entry = {}, [], ""
    for line in text.splitlines():
        if begin := BEGIN.match(line):
            lines = bodies[begin[2]] = []
            entry = begin[2] if begin[1] else entry
        lines.append(line)
    return bodies, entry
