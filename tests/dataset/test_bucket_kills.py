"""Writers of a dataset in a bucket race, are killed and are lied to, and nothing goes wrong.

"Wrong" is what a reader or a later writer could meet: an attempt that believes falsely that it was
the first, a first one that believes it was not (and would delete its files), a done-marker without
its files, a dataset that cannot be finished. Two changes to the code prove that this is seen: if
`Bucket.claim` believes "already exists", and if the service ignores conditions (below).

The long races print how much happened:

    JAXDIFF_RACE_SHARDS=1000 python -m pytest -s -m "race or azurite" THIS_FILE
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import bucket_writers
import lying_proxy
import making
import obstore
import pyarrow.parquet as pq
import pytest
import servers

from jaxdiff.dataset import bucket, ledger, names, proof
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import Run, open_run

SHARDS = int(os.environ.get("JAXDIFF_RACE_SHARDS", "1000"))  # of the long races
TESTS = Path(__file__).parents[1]
SIZES = {"images_per_shard": 1, "batch_size": 1}


class Race:
    """A race for the shards of one dataset, and what came of it.

    Attributes:
      made: the run in the bucket.
      kills: how many writers were killed.
      spoiled, requests: how many answers were spoiled, by kind, and of how many requests.
      beliefs: what each attempt for a shard believed last.
    """

    def __init__(self, server: servers.Server, checkpoint: Path, folder: Path):
        self._server, self._checkpoint, self._folder = server, checkpoint, folder
        self._manifest, self._address = folder / "rows.jsonl", server.address("sets/one")

    def run(self, count: int, kills: int, salts: str = "salted", seed: int = 1, **proxied) -> None:
        """Lets writers race; their proxy lies, unless other arguments for it are given."""
        rows = ({"prompt": f"ring {number}"} for number in range(count))
        self._manifest.write_text("\n".join(map(json.dumps, rows)))
        self.made = making.make_plan(self._address, self._manifest, self._checkpoint, **SIZES)
        proxied = proxied or {"lie": lying_proxy.lies(seed, self._server.scheme)}
        writers = [sys.executable, bucket_writers.__file__, self._address, str(self._folder)]
        with lying_proxy.proxy(self._server.port, **proxied) as proxy:
            environment = os.environ | self._server.at(proxy.port).environment
            environment["PYTHONPATH"] = os.pathsep.join((str(TESTS), str(TESTS.parent)))
            ended = subprocess.run(
                [*writers, str(seed), str(kills), salts],
                env=environment,
                capture_output=True,
                text=True,
            )
        assert ended.returncode == 0, ended.stderr
        said = json.loads(ended.stdout)
        self.kills, self._gave_up, self._seconds = said["kills"], said["gave_up"], said["seconds"]
        self.spoiled, self.requests = proxy.spoiled, proxy.requests.total()
        lines = (self._folder / bucket_writers.BELIEFS).read_text().splitlines()
        every = map(json.loads, lines)
        self.beliefs = {(line["shard"], line["attempt"]): line["outcome"] for line in every}

    def wrong(self) -> list[str]:
        """Returns all that went wrong, by what is in the bucket: nobody spoils these answers."""
        client = bucket._client(self._address, bucket.REQUEST_SECONDS)
        nowhere = bucket_writers.NO_SHARD
        found = [said for (shard, _), said in self.beliefs.items() if shard == nowhere]
        for shard in self.made.shards:
            marker = json.loads(bytes(obstore.get(client, shards.marker_name(shard)).bytes()))
            won = {n for (s, n), said in self.beliefs.items() if s == shard and said == "won"}
            first = marker["facts"]["attempt"]
            found += [f"{shard}: a false winner" for _ in won - {first}]
            if self.beliefs[shard, first] == "lost":
                found.append(f"{shard}: the first was told that it lost")
            for name, file in marker["files"].items():
                try:
                    content = bytes(obstore.get(client, name).bytes())
                except FileNotFoundError:
                    found.append(f"{shard}: a marker without its file")
                    continue
                if hashlib.sha256(content).hexdigest() != file["sha256"]:
                    found.append(f"{shard}: a file has other bytes than its marker says")
        return found

    def local(self) -> Run:
        """Makes the same dataset in a directory."""
        directory = self._folder / "local"
        run = making.make_plan(directory, self._manifest, self._checkpoint, **SIZES)
        for shard in run.shards:
            making.make_shard(run, shard)
        ledger.finalize(run, 0.0)
        return run

    def __str__(self) -> str:
        outcomes, count = Counter(self.beliefs.values()), len(self.made.shards)
        return (
            f"{self._address}: {len(self.beliefs)} attempts ({dict(outcomes)}), {count} commits, "
            f"{self.kills} kills, {self._gave_up} gave up, {self.spoiled.total()} spoiled answers "
            f"({dict(self.spoiled)}), {self._seconds:.1f} s, "
            f"{self.requests / count:.1f} requests per shard"
        )


@pytest.fixture
def race(tmp_path, tiny_checkpoint, monkeypatch):
    """Lets writers race: `race("moto", count=24, kills=6)` returns the `Race` when it is over."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # is read again
    with contextlib.ExitStack() as running:

        def start(name: str, **said) -> Race:
            server = running.enter_context(servers.SERVERS[name](tmp_path))
            for variable, value in server.environment.items():
                monkeypatch.setenv(variable, value)
            bucket._client.cache_clear()
            over = Race(server, tiny_checkpoint, tmp_path)
            over.run(**said)
            print(over)
            return over

        yield start
    bucket._client.cache_clear()


def assert_sound(over: Race) -> None:
    """Checks the race, what its writers say they finished, and the dataset finished again."""
    assert over.wrong() == []
    assert over.kills > 0
    assert sum(map(over.spoiled.__getitem__, lying_proxy.AFTER)) > 0
    assert "lost" in over.beliefs.values()
    now, root = over.made.snapshot(), proof.read(over.made.store)
    markers = [shards.read_marker(now, shard) for shard in now.shards]
    assert proof.differences(root, proof.now(now, markers, root.counts)) == []
    ledger.finalize(over.made, 0.0)  # a killed writer may have left files of a lost attempt
    counts, problems = ledger.verify(over.made.address)
    assert problems == []
    assert counts["made"] == counts["planned"] == len(over.made.shards)


def content(run: Run) -> dict[str, object]:
    """Returns a dataset's content, without times and without hashes in the names of files.

    The card is left out: it says how to read files where they are.
    """
    plain = {
        name: run.store.read(name)
        for name in (names.REJECTED, names.FAILED, names.CROISSANT, names.PLAN_FILE)
    }
    for name in run.plan.sha256:
        plain[name] = run.store.read(f"{names.PLAN}/{name}")
    for shard in run.shards:
        marker = shards.read_marker(run, shard)
        images, metadata = run.file_names(shard)
        plain[images] = run.store.read(marker.images_name)
        with run.store.open(marker.metadata_name) as file:
            rows = pq.read_table(file).to_pylist()
        assert {row.pop("file") for row in rows} == {marker.images_name}
        plain[metadata] = rows
    return plain


def test_writers_that_race_die_and_are_lied_to_lose_nothing(race):
    assert_sound(race("moto", count=24, kills=6))


def test_writers_that_make_equal_bytes_make_the_dataset_of_a_local_job(race):
    over = race("gcs", count=8, kills=3, salts="equal")
    assert_sound(over)
    assert content(open_run(over.made.address)) == content(over.local())


def test_a_service_without_conditions_would_let_all_writers_win(race):
    over = race("gcs", count=2, kills=0, deaf=lying_proxy.CONDITIONS)
    assert any("a false winner" in each for each in over.wrong())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("moto", marks=pytest.mark.race),
        pytest.param("gcs", marks=pytest.mark.race),
        pytest.param("azurite", marks=pytest.mark.azurite),
    ],
)
@pytest.mark.parametrize("salts", ["salted", "equal"])
def test_long_races_lose_nothing(race, name, salts):
    assert_sound(race(name, count=SHARDS, kills=SHARDS // 4, salts=salts))
