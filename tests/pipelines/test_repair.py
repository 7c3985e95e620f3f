"""`verify` names what is wrong with a dataset, and `verify --repair` remakes only that."""

import hashlib
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import files

from jaxdiff import cli
from jaxdiff.dataset import formats, ledger, names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint) -> Path:
    """Returns a finished dataset of three shards."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.txt").write_text("a red circle\na star\n\ntwo rings\n")
    job = {"manifest": folder / "rows.txt", "output": folder / "out", "model": tiny_checkpoint}
    job |= {"steps": 2, "num-images": 3, "batch-size": 1, "images-per-shard": 3}
    assert cli.main(["generate", *(f"--{name}={value}" for name, value in job.items())]) == 0
    return folder / "out"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_on_a_member(path: Path) -> None:
    """Truncates a tar file between two members, so that it is still a valid archive."""
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])


def edit_a_row(path: Path) -> None:
    table = pq.read_table(path)
    prompts = pa.array(["another", *table["prompt"].to_pylist()[1:]])
    index = table.schema.get_field_index("prompt")
    pq.write_table(table.set_column(index, table.schema.field(index), prompts), path)


DAMAGE = {
    "a flipped byte": ("data/train-00001.tar", flip),
    "a removed shard": ("data/train-00002.tar", Path.unlink),
    "a truncated shard": ("data/train-00000.tar", lambda p: p.write_bytes(p.read_bytes()[:5000])),
    "a cut between images": ("data/train-00001.tar", truncate_on_a_member),
    "an edited row": ("metadata/train-00001.parquet", edit_a_row),
    "a removed marker": ("_jaxdiff/done/00001.json", Path.unlink),
    "a damaged marker": ("_jaxdiff/done/00001.json", lambda path: path.write_text("{")),
    "an edited card": ("README.md", lambda path: path.write_text("mine")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_repaired(tmp_path, made, capsys, damage):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    name, do = DAMAGE[damage]
    do(directory / name)
    untouched = {p: p.stat().st_mtime_ns for p in directory.glob("data/*") if p.name not in name}
    capsys.readouterr()
    assert cli.main(["verify", str(directory)]) == 1
    said = capsys.readouterr()
    shard = f"shard {int(name[-10:-5])} of 3" if name.endswith("json") else name
    assert shard in said.out or name in said.out
    assert said.err.splitlines()[-1].startswith(f"{directory}: ")
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    assert "9 made" in capsys.readouterr().out
    assert files(directory) == files(made)
    if "marker" not in damage:
        assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


def test_a_stray_file_is_named_and_kept(tmp_path, made, capsys):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    (directory / "data" / "mine.tar").write_text("mine")
    assert cli.main(["verify", str(directory), "--repair"]) == 1
    said = capsys.readouterr()
    assert "data/mine.tar does not belong to the run; move it elsewhere" in said.out
    assert "1 problem\n" in said.err
    assert (directory / "data" / "mine.tar").read_text() == "mine"


@pytest.mark.parametrize("folder", [names.DATA, names.METADATA, names.DONE, names.WORK])
def test_nothing_is_written_through_a_link(tmp_path, made, capsys, folder):
    directory, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(made, directory)
    flip(directory / "data" / "train-00001.tar")
    (directory / folder).rename(outside)
    (directory / folder).symlink_to(outside)
    before = files(outside)
    assert cli.main(["verify", str(directory), "--repair"]) == 2
    assert f"{directory / folder} is a link" in capsys.readouterr().err
    assert files(outside) == before


def test_a_damaged_plan_cannot_be_repaired(tmp_path, made, capsys):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    (path,) = directory.glob(f"{names.PLAN}/images-*")
    flip(path)
    before = files(directory)
    assert cli.main(["verify", str(directory), "--repair"]) == 2
    assert "this cannot be repaired: start a new run in another" in capsys.readouterr().err
    assert files(directory) == before


def test_a_repair_with_different_bytes_changes_nothing(tmp_path, made, capsys):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    path = directory / "data" / "train-00001.tar"
    marker = directory / "_jaxdiff" / "done" / "00001.json"
    path.unlink()
    marker.write_text(marker.read_text().replace('"sha256": "', '"sha256": "0', 1))
    assert cli.main(["verify", str(directory), "--repair"]) == 1
    said = capsys.readouterr().out
    assert "shard 1 was remade, but its bytes differ from what its marker records" in said
    assert f"delete {marker} and repair again" in said
    assert not path.exists()


def test_a_signed_shard_is_remade_as_it_was_before_signing(tmp_path, made, capsys):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    run = open_run(directory)
    path = directory / "data" / "train-00001.tar"
    samples = list(formats.read_tar(path))
    with shards.Attempt(run, 1, revision=1) as attempt:
        for sample in samples:
            image = sample.image + b"a signature, never the same twice"
            sha256 = hashlib.sha256(image).hexdigest()
            attempt.add(replace(sample, image=image, record={**sample.record, "sha256": sha256}))
        attempt.commit(shards.read_marker(run, 1).facts)
    ledger.finalize(run, 0.0)
    assert cli.main(["verify", str(directory)]) == 0
    path.unlink()
    (directory / "data" / "train-00002.tar").unlink()
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    assert "shard 1 is remade as it was before signing: sign it again" in (capsys.readouterr().out)
    assert files(directory) == files(made)
