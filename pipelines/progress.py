"""Shows a job's progress. Reads it from the files, so any number of processes may do the work."""

import contextlib
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from jaxdiff.dataset import names
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.store import is_address

BAR_SECONDS = 0.5
LISTING_SECONDS = 15.0  # between listings of a bucket
LINE_SECONDS = 30.0
BAR = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} images, {rate_fmt}, {remaining} left"
_told: Callable[[int, int], object] | None = None  # in place of stderr, of the job in this process


@contextlib.contextmanager
def told_to(callback: Callable[[int, int], object]) -> Iterator[None]:
    """Calls a function with the numbers of finished and of all images, from a thread of its own."""
    global _told
    _told = callback
    try:
        yield
    finally:
        _told = None


@contextlib.contextmanager
def shown(run: Run) -> Iterator[None]:
    """Shows progress on stderr: a bar on a terminal, otherwise a line every 30 seconds."""
    if _told is None and sys.stderr is None:  # as in some services
        yield
        return
    done = threading.Event()
    show = _bar if sys.stderr and sys.stderr.isatty() else _lines
    if _told is not None:
        show = partial(_tell, _told)
    counter = Counter(run)
    thread = threading.Thread(target=show, args=(counter, run.plan.images, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Counter:
    """Counts the images of finished shards and of shards in progress."""

    def __init__(self, run: Run):
        self._run = run
        self._stale = {path.name for path in self._attempts()}  # left by a killed run
        self._finished: tuple[float, list[str]] = (-math.inf, [])

    def count(self) -> int:
        """Returns the number of images made or failed so far."""
        images = {}
        for path in self._attempts():
            if path.name not in self._stale:
                with contextlib.suppress(OSError, ValueError):
                    shard = int(path.name.partition("-")[0])
                    images[shard] = max(images.get(shard, 0), int(path.read_text() or 0))
        for entry in self._markers():
            with contextlib.suppress(IndexError, ValueError):  # not one of our files
                shard = int(entry.removesuffix(".json"))
                images[shard] = self._run.plan.shard_sizes[shard]
        return sum(images.values())

    def _attempts(self) -> list[Path]:
        return list(self._run.store.work().glob("*.progress"))

    def _markers(self) -> list[str]:
        listed, entries = self._finished
        wait = LISTING_SECONDS if is_address(self._run.address) else 0.0
        if time.monotonic() >= listed + wait:
            with contextlib.suppress(OSError):  # progress is not worth failing for
                entries = self._run.store.entries(names.DONE)
            self._finished = (time.monotonic(), entries)
        return entries


def _tell(
    callback: Callable[[int, int], object], counter: Counter, total: int, done: threading.Event
) -> None:
    reported, last = None, False
    while not last:
        last = done.wait(BAR_SECONDS)
        if (count := counter.count()) != reported:
            callback(count, total)
            reported = count


def _bar(counter: Counter, total: int, done: threading.Event) -> None:
    start = counter.count()
    columns, lines = shutil.get_terminal_size()  # tqdm draws nothing if it cannot detect the size
    how = {"unit": " images", "bar_format": BAR, "ncols": columns, "nrows": lines}
    with tqdm(total=total, initial=start, desc="compiling", **how) as bar:
        while True:
            last = done.wait(BAR_SECONDS)
            if new := counter.count() - bar.n:
                if bar.n == start:
                    bar.unpause()  # leaves compilation out of the rate
                    bar.set_description_str("generating", refresh=False)
                bar.update(new)
            bar.refresh()
            if last:
                return


def _lines(counter: Counter, total: int, done: threading.Event) -> None:
    first = None
    while not done.wait(LINE_SECONDS):
        count, now = counter.count(), time.monotonic()
        first = first or (count, now)
        line = f"jaxdiff: {count}/{total} images"
        if count > first[0]:
            rate = (count - first[0]) / (now - first[1])
            left = tqdm.format_interval((total - count) / rate)
            line += f", {rate:.2f} images/s, {left} left"
        print(line, file=sys.stderr, flush=True)
