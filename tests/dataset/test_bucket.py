"""Datasets in buckets of real servers, whose answers may get lost on the way."""

import contextlib
import io
import itertools
import os
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import lying_proxy
import making
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers

from jaxdiff.dataset import bucket, ledger, names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from jaxdiff.dataset.store import open_store
from jaxdiff.errors import InputError

PREFIXES = map("sets/{}".format, itertools.count())
SIZES = {"images_per_shard": 4, "batch_size": 2}


@pytest.fixture(
    scope="module", params=["moto", "gcs", pytest.param("azurite", marks=pytest.mark.azurite)]
)
def server(request, tmp_path_factory):
    with servers.SERVERS[request.param](tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """Points the client to a server: `reach(server)`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def to(server: servers.Server) -> None:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket._client.cache_clear()

    yield to
    bucket._client.cache_clear()


@pytest.fixture
def address(server, reach) -> str:
    """The address of nothing yet."""
    reach(server)
    return server.address(next(PREFIXES))


@pytest.fixture
def store(address) -> bucket.Bucket:
    return open_store(address)


@pytest.fixture
def behind(server, reach, monkeypatch):
    """Puts a proxy between: `with behind(lie) as proxy`; requests time out soon."""
    monkeypatch.setattr(bucket, "REQUEST_SECONDS", 0.9)
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 1.5)
    monkeypatch.setattr(bucket, "CLAIM_SECONDS", 1.5)

    @contextlib.contextmanager
    def put(lie=lying_proxy.honest, deaf=()):
        with lying_proxy.proxy(server.port, lie, deaf) as proxy:
            reach(server.at(proxy.port))
            yield proxy
        reach(server)

    return put


@pytest.fixture
def planned(address, manifest, tiny_checkpoint):
    """A planned dataset of three shards."""
    return making.make_plan(address, manifest, tiny_checkpoint, **SIZES)


def put_file(store: bucket.Bucket, tmp_path, name: str, content: bytes) -> str | None:
    path = store.staging("attempt", name)
    path.write_bytes(content)
    etag = store.stage("attempt", name, name)
    store.publish("attempt", name)
    assert not path.exists()
    return etag


def no_deletions(method, path, headers) -> str | None:
    is_deletion = method == "DELETE" or "delete" in path or "batch" in path
    return "403 before" if is_deletion else None


def test_the_first_claim_stands(store):
    assert store.claim("done/1.json", "first") == "first"
    assert store.claim("done/1.json", "second") == "first"
    assert store.read("done/1.json") == b"first"
    with ThreadPoolExecutor(8) as threads:
        answers = [*threads.map(partial(store.claim, "done/2.json"), map(str, range(8)))]
    assert {*answers} == {store.read("done/2.json").decode()}


def test_objects_are_listed_replaced_and_deleted(store):
    store.swap("README.md", "old")
    before = store.version("README.md")
    store.swap("README.md", "new")
    assert store.version("README.md") != before
    assert (store.read("README.md"), store.size("README.md")) == (b"new", 3)
    for name in ("data/b.tar", "data/a.tar", "data/deep/c.tar", "database"):
        store.swap(name, name)
    assert store.entries("") == ["README.md", "data", "database"]
    assert store.entries("data") == ["a.tar", "b.tar", "deep"]
    assert store.entries("nothing") == []
    assert store.kind("data/a.tar") is None
    assert store.kind("data", folder=True) is None
    for name, folder in (("data", False), ("data/a", False), ("dat", True)):
        assert store.kind(name, folder) == "is missing"
    store.delete("data/a.tar", "data/a.tar", "nothing")
    assert store.entries("data") == ["b.tar", "deep"]
    with pytest.raises(ValueError, match=r"data/a\.tar is missing"):
        store.read("data/a.tar")
    with pytest.raises(FileNotFoundError):
        store.size("data/a.tar")


def test_a_row_group_is_read_without_the_rest(store, tmp_path, behind):
    column = pa.array([os.urandom(2**20) for _ in range(12)])
    file = io.BytesIO()
    pq.write_table(pa.table({"bytes": column}), file, row_group_size=1)
    put_file(store, tmp_path, "data/rows.parquet", file.getvalue())
    asked = []

    def note(method, path, headers) -> None:
        asked.append((method, headers.get("Range")))

    with behind(note), store.open("data/rows.parquet") as opened, pq.ParquetFile(opened) as rows:
        assert rows.read_row_group(7)["bytes"].to_pylist() == [column[7].as_py()]
    (head, _), *ranges = asked
    assert head == "HEAD"
    spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for _, span in ranges]
    assert len(spans) <= 5
    assert sum(last - first + 1 for first, last in spans) < 5 * 2**20


def test_files_are_fetched_for_a_while(store, tmp_path):
    put_file(store, tmp_path, "data/a.tar", b"abc")
    with store.fetched("data/a.tar", "data/b.tar") as local:
        assert local.entries("data") == ["a.tar"]
        assert local.read("data/a.tar") == b"abc"
    assert not [*store.work().iterdir()]


def test_files_that_a_killed_process_fetched_are_swept(store):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    mine = store.scratch("fetched")
    theirs = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    for folder in (theirs, mine):
        folder.mkdir()
        (folder / "a.tar").write_bytes(b"abc")
    store.sweep()
    assert [*store.work().iterdir()] == [mine]


def test_a_snapshot_asks_nothing_again(planned, behind):
    making.make_shard(planned, 0)
    marker = shards.read_marker(planned, 0)
    with behind() as proxy:
        now = planned.snapshot()
        before = proxy.requests.total()
        assert shards.read_marker(now, 0) == marker
        assert shards.read_marker(now, 1) is None
        assert [shards.why_not(now, marker, name, "etag") for name in marker.files] == [None, None]
        assert now.store.entries(names.DONE) == ["00000.json"]
        assert now.store.kind("data/nothing.tar") == "is missing"
        assert proxy.requests.total() == before
        assert before <= 4  # three listings and a marker
    making.make_shard(planned, 1)
    assert ledger.todo(now) == [1, 2]
    assert ledger.todo(planned) == [2]


def test_a_finished_dataset_is_not_asked_about_each_shard_again(planned, behind):
    for shard in planned.shards:
        making.make_shard(planned, shard)
    ledger.finalize(planned, 0.0)
    asked = []
    with behind(lambda _, path, __: asked.append(path)):
        ledger.settle(planned)
        now = planned.snapshot()
        before = len(asked)
        ledger.refuse_damaged(now)
        assert ledger.finished(now)["made"] == 9
        assert ledger.todo(now) == ledger.with_failed(now) == []
    assert not [path for path in asked[before:] if names.DONE in path or "train-" in path]


def test_of_planners_that_race_one_makes_the_plan(address, manifest, tiny_checkpoint):
    def plan(seed: int) -> str:
        return making.make_plan(address, manifest, tiny_checkpoint, seed=seed, **SIZES).plan.id

    with ThreadPoolExecutor(4) as threads:
        ids = [*threads.map(plan, range(4))]
    assert {*ids} == {open_run(address).plan.id}
    run = open_run(address)
    for shard in run.shards:
        making.make_shard(run, shard)
    ledger.finalize(run, 0.0)
    assert ledger.verify(address)[1] == []  # nothing is left of the other plans


@pytest.mark.parametrize("lost", ["503 after", "cut after"])
def test_an_extension_stands_though_its_answer_is_lost(
    planned, behind, manifest, tiny_checkpoint, lost
):
    with manifest.open("a") as file:
        file.write('\n{"prompt": "a heart"}\n')
    with behind(lying_proxy.once(lost, "PUT", names.PLAN_JSON)) as proxy:
        making.make_plan(planned.address, manifest, tiny_checkpoint, planned, **SIZES)
        assert proxy.spoiled[lost] == 1
    assert open_run(planned.address).plan.images == planned.plan.images + 1


def test_an_extension_of_a_plan_that_was_replaced_is_refused(planned, manifest, tiny_checkpoint):
    def extend(prompt: str):
        manifest.write_text(f'{rows}\n{{"prompt": "{prompt}"}}\n')
        return making.make_plan(planned.address, manifest, tiny_checkpoint, planned, **SIZES)

    rows = manifest.read_text()
    first = extend("a heart")
    assert extend("a heart").plan == first.plan  # another process does the same
    planned.store.swap(names.SUCCESS, "of the first")
    with pytest.raises(InputError, match="another process replaced the plan"):
        extend("a moon")
    assert planned.store.read(names.SUCCESS) == b"of the first"
    for shard in first.shards:
        making.make_shard(first, shard)
    with pytest.raises(ledger.IncompleteError, match="another process replaced the plan"):
        ledger.finalize(planned, 0.0)
    ledger.finalize(first, 0.0)  # deletes the files of the refused plan
    assert ledger.verify(planned.address)[1] == []


def test_files_of_an_attempt_that_was_not_the_first_are_deleted(planned, behind):
    for shard in planned.shards:
        assert making.make_shard(planned, shard)
    before = planned.store.entries(names.DATA)
    assert not making.make_shard(planned, 0, salt=1)
    assert planned.store.entries(names.DATA) == before

    with behind(no_deletions) as proxy:
        assert not making.make_shard(planned, 0, salt=1)
        assert proxy.spoiled.total() > 0
    assert len(planned.store.entries(names.DATA)) == len(before) + 1  # it could not be deleted
    ledger.finalize(planned, 0.0)
    assert planned.store.entries(names.DATA) == before
    assert ledger.verify(planned.address)[1] == []


def test_files_of_a_revision_that_may_still_come_are_not_deleted(planned):
    for shard in planned.shards:
        making.make_shard(planned, shard)
    coming = names.hashed("data/train-00001.tar", 1, "a" * 64)
    planned.store.swap(coming, "of an attempt that has not claimed its marker yet")
    with pytest.raises(ledger.IncompleteError, match=f"{coming} was left by a job"):
        ledger.finalize(planned, 0.0)
    assert planned.store.kind(coming) is None


def test_processes_that_finish_a_dataset_vouch_for_the_same(planned):
    for shard in planned.shards:
        making.make_shard(planned, shard)
    start = threading.Barrier(4)

    def finalize(_) -> None:
        start.wait()
        ledger.finalize(open_run(planned.address), 0.0)

    with ThreadPoolExecutor(4) as threads:
        [*threads.map(finalize, range(4))]
    assert ledger.verify(planned.address)[1] == []


def test_a_file_that_somebody_replaced_is_named(planned):
    for shard in planned.shards:
        making.make_shard(planned, shard)
    ledger.finalize(planned, 0.0)
    name = shards.read_marker(planned, 1).images_name
    planned.store.swap(name, "x" * planned.store.size(name))
    assert f"{name} has changed" in ledger.verify(planned.address)[1][0]
    with pytest.raises(ledger.IncompleteError, match=f"{name} has changed"):
        ledger.finalize(planned, 0.0)


# Elsewhere than on S3, 409 does not mean that nothing was done.
@pytest.mark.parametrize(
    ("server", "lie"),
    [
        *itertools.product(("moto", "gcs"), [*lying_proxy.AFTER, "503 before", "cut before"]),
        ("moto", "409 before"),
    ],
    indirect=["server"],
)
def test_a_claim_is_right_whatever_the_answer(store, behind, lie):
    with behind(lying_proxy.once(lie, "PUT")) as proxy:
        assert store.claim("done/1.json", "mine") == "mine"
        assert proxy.spoiled[lie] == 1
    assert store.read("done/1.json") == b"mine"


def test_a_claim_that_nobody_can_answer_deletes_nothing(planned, behind):
    def no_markers(method, path, headers) -> str | None:
        return "403 before" if method == "PUT" and names.DONE in path else None

    with behind(no_markers), pytest.raises(OSError, match="cannot be written with certainty"):
        making.make_shard(planned, 0)
    assert len(planned.store.entries(names.DATA)) == 1
    assert ledger.todo(planned) == [0, 1, 2]


@pytest.mark.parametrize("lie", ["503 after", "cut after", "hang after"])
def test_a_large_file_is_whole_though_the_last_answer_is_lost(store, server, behind, tmp_path, lie):
    content = os.urandom(6 * 2**20)
    last = {"az": ("PUT", "blocklist")}.get(server.scheme, ("POST", "uploadId"))
    with behind(lying_proxy.once(lie, *last)) as proxy:
        etag = put_file(store, tmp_path, "data/large.tar", content)
        assert proxy.spoiled[lie] == 1
    assert etag == store.etag("data/large.tar")
    assert store.read("data/large.tar") == content


# Requests to Azure sign the conditions, and those to GCS have one header for both.
@pytest.mark.parametrize(
    ("server", "deaf"),
    [("moto", lying_proxy.CREATED), ("moto", ("If-Match",)), ("gcs", lying_proxy.CREATED)],
    indirect=["server"],
)
def test_a_service_that_ignores_conditions_is_refused(store, behind, deaf):
    with behind(deaf=deaf), pytest.raises(InputError, match="ignores conditional writes") as said:
        store.held().__enter__()
    assert "\n" not in str(said.value)
    assert store.entries("") == []  # the probe is gone


def test_a_bucket_is_tried_again_if_the_answer_is_lost(store, behind):
    with behind(lying_proxy.once("503 after", "PUT", "probe")) as proxy:
        with store.held():
            pass
        assert proxy.spoiled["503 after"] == 1


def test_a_probe_that_is_left_does_not_disturb(planned, behind):
    for shard in planned.shards:
        making.make_shard(planned, shard)
    ledger.finalize(planned, 0.0)
    with behind(no_deletions), pytest.raises(InputError, match="access is denied"):
        planned.store.held().__enter__()
    assert planned.store.entries(names.TMP)
    assert ledger.verify(planned.address)[1] == []


def test_what_cannot_be_used_is_refused_on_one_line(server, store, behind):
    def refused(said: str, where: bucket.Bucket) -> None:
        with pytest.raises(InputError, match=said) as problem:
            where.held().__enter__()
        assert where.address in str(problem.value)
        assert "\n" not in str(problem.value)

    refused("the bucket does not exist", open_store(f"{server.scheme}://nowhere/sets"))
    with behind(lambda *_: "403 before"):
        refused("access is denied; check the credentials", store)
    store.swap("notes.txt", "somebody's")
    refused("holds other objects and no jaxdiff run .notes.txt.", store)


@pytest.mark.parametrize("address", ["s3://", "s3:///sets", "ftp://host/x", "s3://bucket?x=1"])
def test_other_addresses_are_refused(address):
    with pytest.raises(InputError, match="is not the address of a bucket"):
        open_store(address)
