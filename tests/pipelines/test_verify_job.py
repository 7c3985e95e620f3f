"""`jaxdiff verify` on Beam says what it says without; on a disk, and in a bucket of Moto's."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dataset import servers
from making import make_plan, make_shard

from jaxdiff import cli
from jaxdiff.dataset import ledger, names
from jaxdiff.dataset.store import open_store

BEAM = ("--runner", "FnApiRunner")
SHARDS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[servers.Server]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(params=["disk", "bucket"])
def dataset(request, tmp_path, tiny_checkpoint, monkeypatch) -> str:
    """A finished dataset of twelve shards, each of two images of noise; one has failed."""
    where = str(tmp_path / "made")
    if request.param == "bucket":
        server = request.getfixturevalue("server")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        where = server.address(tmp_path.name)
    manifest = tmp_path / "rows.txt"
    manifest.write_text("".join(f"a ring {number}\n" for number in range(2 * SHARDS)))
    run = make_plan(where, manifest, tiny_checkpoint, images_per_shard=2, batch_size=2)
    for shard in run.shards:
        make_shard(run, shard, failing=("000000003",))
    ledger.finalize(run, 0.0)
    shutil.rmtree(run.store.work())  # as a job leaves it
    return where


@pytest.fixture
def said(capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `verify`; returns its exit code and what it printed."""

    def said(where: str, *more: str) -> tuple[int, str, str]:
        code = cli.main(["verify", where, *more])
        return code, *capsys.readouterr()

    return said


@pytest.fixture
def same(dataset, said) -> Callable[..., None]:
    """Checks that `verify` finds some problems, and says the same with Beam as without."""

    def same(*parts: str) -> None:
        code, out, err = said(dataset)
        assert code == 1
        assert err.startswith(f"{dataset}: {len(out.splitlines())} problem")
        assert [part for part in parts if part not in out] == []
        assert said(dataset, *BEAM) == (code, out, err)

    return same


def data(where: str, shard: int) -> str:
    """The name of a shard's images."""
    store = open_store(where)
    (name,) = (each for each in store.entries(names.DATA) if each.startswith(f"train-{shard:05d}"))
    return f"{names.DATA}/{name}"


def write(where: str, name: str, content: bytes, folder: Path) -> None:
    """Writes a file of a dataset, as no job does."""
    store = open_store(where)
    if store.renames:
        store.path(name).write_bytes(content)
    else:
        path = folder / "content"
        path.write_bytes(content)
        store._upload(path, name)


def test_a_sound_dataset_is_complete(dataset, said):
    store = open_store(dataset)
    before = store.entries(names.WORK)
    code, out, err = said(dataset)
    assert (code, err) == (0, "")
    assert f"{dataset} is complete" in out
    assert "rows: 24 used, 0 rejected, 0 blank; images: 23 of 24 made, 1 failed" in out
    assert said(dataset, *BEAM) == (code, out, err)
    assert store.entries(names.WORK) == before


def test_damaged_and_missing_files_are_found_in_the_same_words(dataset, same, tmp_path):
    store = open_store(dataset)
    first, second = data(dataset, 3), data(dataset, 10)
    content = store.read(first)
    flipped = content[:600] + bytes([content[600] ^ 1]) + content[601:]
    write(dataset, first, flipped, tmp_path)
    store.delete(second, f"{names.DONE}/00007.json")
    same(
        f"{first} has changed: its SHA-256 is not",
        "shard 7 of 12 is not finished",
        f"{second} is missing",
    )


def test_foreign_and_edited_files_are_found_in_the_same_words(dataset, same, tmp_path):
    write(dataset, "data/mine.tar", b"x", tmp_path)
    same("data/mine.tar does not belong to the run")
    open_store(dataset).delete("data/mine.tar")
    write(dataset, names.CARD, b"# Mine", tmp_path)
    same("README.md differs from what the run wrote")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("/nowhere", *BEAM), "/nowhere holds no jaxdiff run"),
        (("/nowhere", "--runner", "NoRunner"), "unknown --runner NoRunner; known runners: "),
        (("/nowhere", "--repair", *BEAM), "--repair works on this machine only, without --runner"),
        (("/nowhere", "--flink_master=x"), "--flink_master is an option of FlinkRunner"),
        (("/nowhere", "/elsewhere"), "unexpected '/elsewhere'"),
        (("/nowhere", "--repiar"), "unknown option --repiar"),
    ],
)
def test_a_mistake_is_one_line(words, message, said):
    code, out, err = said(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxdiff: {message}")
    assert len(err.splitlines()) == 1


def test_without_options_of_beam_it_is_not_imported():
    code = """
import sys
from jaxdiff import cli

assert cli.main(["verify", "/nowhere"]) == 2
assert not {"apache_beam", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
