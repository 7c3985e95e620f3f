"""Several processes on one output: which shards each of them makes next.

No process talks to another. If a scheduler numbers them, each has a part of its own to begin with;
then it lists what is left, and takes some of that at random. Others go through all shards, each in
another order. Where two make the same shard, one of them was too late.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A scheduler's variables: a process's index, the number of processes, and the lowest index.
SCHEDULERS = (
    ("JOB_COMPLETION_INDEX", None, None),  # Kubernetes, which does not say how many there are
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT", None),
    ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT", None),
)
UNKNOWN_COUNT = 8


@dataclass(frozen=True)
class Place:
    """A process's place among others: its index, and their number if that is known."""

    index: int
    count: int | None = None

    def first(self, todo: Sequence[int]) -> list[int]:
        """Returns the shards to begin with: a part of `todo` that is this process's own."""
        if self.count is None:
            return self.next(todo)
        start, stop = (n * len(todo) // self.count for n in (self.index, self.index + 1))
        return [*todo[start:stop]] or self.next(todo)

    def next(self, todo: Sequence[int]) -> list[int]:
        """Returns some of the shards that are left, in random order."""
        share = -(-len(todo) // (2 * (self.count or UNKNOWN_COUNT)))
        return random.Random(f"{self.index} {len(todo)}").sample(todo, share)


def shuffled(todo: Sequence[int]) -> list[int]:
    """Returns the shards in an order that other processes will not have."""
    return random.Random().sample(todo, len(todo))


def place(environment: Mapping[str, str]) -> Place | None:
    """Returns the place that a scheduler gave this process, or None if there is none."""
    for index, count, least in SCHEDULERS:
        here = _number(environment, index)
        if here is not None:
            here -= _number(environment, least) or 0
            many = _number(environment, count)
            return Place(here, many if many and here < many else None)
    return None


def _number(environment: Mapping[str, str], name: str | None) -> int | None:
    text = environment.get(name, "") if name else ""
    return int(text) if text.isascii() and text.isdigit() else None
