"""Simulates processes that make one dataset in a bucket: real plan, real store code, no images.

    python -m tools.simulate_processes --shards 100000 --processes 1000

Time is simulated: how long a shard takes, slow processes, deaths, and one restart of everything.
Real are the plan, the order in which processes take shards, every request of `dataset/bucket.py`
(to a store in memory), the files (an image is 64 bytes), and how the dataset is finished.
"""

import argparse
import hashlib
import heapq
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
from obstore.store import MemoryStore

from jaxdiff.dataset import bucket, ledger, planning
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.plan import PlannedImage
from jaxdiff.dataset.run import Run
from jaxdiff.families.opening import open_ensemble
from pipelines.processes import Place

ADDRESS = "s3://simulated/set"
START_SECONDS = 120.0  # to load and compile
SHARD_SECONDS, DEVIATION = 300.0, 0.1
SLOW_SHARE, SLOWNESS = 0.02, 4.0  # of the processes
DEATHS_PER_HOUR, AWAY_SECONDS = 0.05, 180.0
LISTING_SECONDS = 5.0  # for which processes that list at once get one answer here
PAGE = 1000  # names in one answer to a listing
WINDOW_SECONDS = 10.0  # in which requests are counted, to find the busiest
WRITES = ("put", "delete")
# Requests a second that S3 promises for one prefix: writes, and reads.
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
S3_WRITES, S3_READS = 3500, 5500
FACTS = {
    "device": "simulated",
    "padded": 0,
    "versions": {},
    "seconds": {"load": 0.0, "compile": 0.0, "generate": SHARD_SECONDS},
}


@dataclass
class Requests:
    """The client of `dataset/bucket.py`, counting: stands for the module `obstore` there."""

    now: float = 0.0
    kinds: Counter = field(default_factory=Counter)
    windows: dict[str, Counter] = field(
        default_factory=lambda: {"writes": Counter(), "reads": Counter()}
    )

    def count(self, kind: str, number: int = 1) -> None:
        """Counts requests of a kind at the simulated time."""
        self.kinds[kind] += number
        side = "writes" if kind in WRITES else "reads"
        self.windows[side][int(self.now / WINDOW_SECONDS)] += number

    def __getattr__(self, name: str) -> Any:
        function = getattr(obstore, name)

        def counted(*arguments, **options):
            self.count(name)
            return function(*arguments, **options)

        return counted

    def list(self, *arguments, **options) -> Iterator:
        """Lists objects, page by page."""
        for page in obstore.list(*arguments, **options):
            self.count("list")
            yield page

    def list_with_delimiter(self, *arguments, **options) -> dict:
        """Lists a folder; the client asks for page after page."""
        found = obstore.list_with_delimiter(*arguments, **options)
        self.count("list", max(1, -(-len(found["objects"]) // PAGE)))
        return found

    def peak(self, side: str) -> float:
        """Returns the requests a second of the busiest window."""
        return max(self.windows[side].values(), default=0) / WINDOW_SECONDS


class Simulation:
    """Processes on one run, and a clock."""

    def __init__(self, run: Run, processes: int, requests: Requests, seed: int = 0):
        self.run, self.processes, self.requests = run, processes, requests
        self.random = random.Random(seed)
        self.late, self.deaths, self.lost_seconds = 0, 0, 0.0
        self._todo: tuple[float, list[int], int] = (-LISTING_SECONDS, [], 0)
        slow = self.random.sample(range(processes), round(SLOW_SHARE * processes))
        self._pace = {index: SLOWNESS for index in slow}

    def until_finished(self, restart_at: float) -> float:
        """Runs all processes until each sees that nothing is left; returns the seconds.

        Args:
          restart_at: when all processes die at once, in seconds.
        """
        queue: list[tuple[float, int, int, str, Iterator[float]]] = []
        ends, number = [], 0

        def start(index: int, at: float) -> None:
            nonlocal number
            number += 1
            heapq.heappush(queue, (at, number, index, "work", self._process(index)))

        dies = {index: self._lifetime() for index in range(self.processes)}
        for index in range(self.processes):
            start(index, 0.0)
        restarted = False
        while queue:
            now, _, index, _, process = heapq.heappop(queue)
            self.requests.now = now
            if not restarted and now >= restart_at:
                restarted = True
                waiting = [index, *(entry[2] for entry in queue)]
                queue.clear()
                self.deaths += len(waiting)
                for each in waiting:
                    start(each, restart_at + AWAY_SECONDS)
                continue
            step = next(process, None)
            if step is None:
                ends.append(now)
            elif now + step > dies[index]:
                self.deaths += 1
                self.lost_seconds += dies[index] - now
                start(index, dies[index] + AWAY_SECONDS)
                dies[index] += AWAY_SECONDS + self._lifetime()
            else:
                number += 1
                heapq.heappush(queue, (now + step, number, index, "work", process))
        return max(ends)

    def _lifetime(self) -> float:
        return self.random.expovariate(DEATHS_PER_HOUR / 3600.0)

    def _process(self, index: int) -> Iterator[float]:
        """Does what `pipelines/generate.py` does in one process; yields seconds to wait."""
        yield START_SECONDS * self.random.uniform(0.8, 1.2)
        place = Place(index, self.processes)
        todo = self.todo()
        part = place.first(todo)
        while part:
            for shard in part:
                if shards.read_marker(self.run, shard) is None:
                    pace = self._pace.get(index, 1.0) * self.random.gauss(1.0, DEVIATION)
                    yield max(SHARD_SECONDS * pace, 1.0)
                    self.late += not self.make(shard)
            yield LISTING_SECONDS
            part = place.next(self.todo())

    def todo(self) -> list[int]:
        """Returns the unfinished shards, as `ledger.todo` lists them."""
        listed, found, pages = self._todo
        if self.requests.now >= listed + LISTING_SECONDS:
            before = self.requests.kinds["list"]
            found = ledger.todo(self.run)
            self._todo = self.requests.now, found, self.requests.kinds["list"] - before
        else:
            self.requests.count("list", pages)
        return found

    def make(self, shard: int) -> bool:
        """Writes and commits a shard; returns whether this attempt was the first."""
        with shards.Attempt(self.run, shard) as attempt:
            for image in self.run.planned(shard):
                attempt.add(stand_in(image, self.run))
            return attempt.commit(FACTS)


def stand_in(image: PlannedImage, run: Run) -> Sample:
    """Returns 64 bytes that follow from an image's seed, with its record."""
    content = hashlib.sha512(str(image.request.seed).encode()).digest()
    digest = hashlib.sha256(content).hexdigest()
    (known,) = shards.records([image], run.plan)
    known |= {"sha256": digest, "pixel_sha256": digest}
    return Sample({name: known[name] for name, _ in run.plan.record_fields}, content, "png")


def planned(folder: Path, count: int) -> Run:
    """Plans a dataset of shards of one image in the simulated bucket."""
    manifest = folder / "prompts.txt"
    manifest.write_text("".join(f"prompt {number}\n" for number in range(count)))
    model = open_ensemble("shapes64")
    said = {"images_per_shard": 1, "batch_size": 1}
    settings = job_settings.resolve(said, model)
    found = manifests.find(manifest)
    identity = planning.identify(found, settings, model)
    models = {"model": "shapes64", "variant": None, "refiner": None}
    planning.make(found, settings, model, identity, folder / "plan", models=models)
    return runs.begin(folder / "plan", bucket.open_bucket(ADDRESS))


def main() -> None:
    """Runs the simulation and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=1000)
    said = parser.parse_args()
    requests, store = Requests(), MemoryStore()
    bucket.obstore = requests
    bucket._client = lambda *_, **__: store
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = planned(Path(folder), said.shards)
    print(f"planned in {time.monotonic() - began:.0f} s", flush=True)
    requests.kinds.clear()
    simulation = Simulation(run, said.processes, requests)
    ideal = START_SECONDS + said.shards * SHARD_SECONDS / said.processes
    seconds = simulation.until_finished(restart_at=ideal / 2)
    made = said.shards + simulation.late
    print(
        f"{said.shards} shards, {said.processes} processes: {seconds / 3600:.2f} h "
        f"({seconds / ideal:.2f} of the ideal), {simulation.deaths} deaths, "
        f"{simulation.late} shards made twice ({simulation.late / made:.2%}), "
        f"{sum(requests.kinds.values()) / said.shards:.1f} requests a shard {dict(requests.kinds)}"
    )
    for side, most in (("writes", S3_WRITES), ("reads", S3_READS)):
        peak = requests.peak(side)
        print(
            f"{side}: at most {peak:.1f} a second; S3's {most} a second suffice for "
            f"{most / peak * said.processes:,.0f} such processes"
        )
    requests.kinds.clear()
    for name, function in (
        ("todo", lambda: ledger.todo(run)),
        ("finalize", lambda: ledger.finalize(run, 0.0)),
    ):
        began = time.monotonic()
        function()
        print(
            f"{name}: {time.monotonic() - began:.1f} s, {dict(requests.kinds)} requests", flush=True
        )
        requests.kinds.clear()


if __name__ == "__main__":
    main()
