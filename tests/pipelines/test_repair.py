"""`verify` names what is wrong with a dataset, and `verify --repair` remakes only that."""

import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import further
from making import files

from jaxdiff import cli
from jaxdiff.dataset import formats, ledger, names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError

pytestmark = pytest.mark.usefixtures("noise_throughout")


@pytest.fixture(scope="module")
def made(noise_throughout, tmp_path_factory, tiny_checkpoint) -> Path:
    """Returns a finished dataset of three shards."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.txt").write_text("a red circle\na star\n\ntwo rings\n")
    assert generate(folder / "out", folder / "rows.txt", tiny_checkpoint) == 0
    return folder / "out"


def generate(output: Path, manifest: Path, model: Path) -> int:
    job = {"manifest": manifest, "output": output, "model": model}
    job |= {"steps": 2, "num-images": 3, "batch-size": 1, "images-per-shard": 3}
    return cli.main(["generate", *(f"--{name}={value}" for name, value in job.items())])


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


# Of the further ones, dataset/test_damage.py has more, repaired without Beam.
@pytest.mark.parametrize(
    "damage",
    [
        *("a flipped byte", "a removed shard", "a removed marker", "an edited card"),
        *map(further, ("a truncated shard", "a cut between images")),
        *map(further, ("an edited row", "a damaged marker")),
    ],
)
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


def test_a_model_makes_the_same_images_again(tmp_path, finish, finished, faulty):
    faulty(None)
    finish(tmp_path / "out", "--limit=4")
    (tmp_path / "out" / "data" / "train-00000.tar").unlink()
    assert cli.main(["verify", str(tmp_path / "out"), "--repair"]) == 0
    assert files(tmp_path / "out") == files(finished("--limit=4"))


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


def edit(path: Path, change) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said, indent=2) + "\n")


def forge(directory: Path) -> None:
    """Replaces the first image of shard 1 and updates every hash of it but the root's."""
    run = open_run(directory)
    marker = shards.read_marker(run, 1)
    samples = list(shards.samples(run, shards.read_marker(run, 1), run.store))
    pixels = np.zeros((64, 64, 3), np.uint8)
    with shards.Attempt(run, 1, revision=1) as attempt:
        attempt.add(shards.encode(run.planned(1)[0], pixels, run.plan))
        for sample in samples[1:]:
            attempt.add(sample)
        attempt.commit(marker.facts)
    forged = directory / shards.marker_name(1, 1)
    edit(forged, lambda said: said.update(revision=0, attempt=marker.attempt))
    forged.replace(directory / shards.marker_name(1))


@pytest.mark.parametrize("has_root", [True, False])
def test_a_forged_shard_is_made_again_if_there_is_a_root(tmp_path, made, capsys, has_root):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    forge(directory)
    if not has_root:  # then the forged marker is all there is
        (directory / "_SUCCESS").unlink()
    assert cli.main(["verify", str(directory)]) == 1
    assert ("shard 1 is not the one that _SUCCESS" in capsys.readouterr().out) == has_root
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    assert (files(directory) == files(made)) == has_root


def test_nothing_but_a_repair_continues_a_forged_dataset(tmp_path, made, capsys):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    forge(directory)
    (directory / "README.md").unlink()  # so that it is not finished
    before = files(directory)
    (made.parent / "more.txt").write_text((made.parent / "rows.txt").read_text() + "a cross\n")
    for manifest in ("rows.txt", "more.txt"):
        assert generate(directory, made.parent / manifest, open_run(made).plan.models["model"]) > 0
        said = capsys.readouterr().err
        assert "the done-markers of shard 1 differ from what _SUCCESS records" in said
        assert f"run `jaxdiff verify {directory} --repair`" in said
    with pytest.raises(InputError, match="the done-markers of shard 1 differ"):
        ledger.refuse_damaged(open_run(directory))
    assert files(directory) == before


@pytest.mark.parametrize("key", ["contents", "files_sha256", "counts", "device", "card"])
def test_nothing_is_written_where_the_root_itself_disagrees(tmp_path, made, capsys, key):
    def change(said: dict) -> None:
        if key == "contents":
            said[key][1] = "0" * 64
        elif key == "files_sha256":
            said[key] = "0" * 64
        elif key == "counts":
            said[key]["made"] = 8
        else:
            said["sha256"][{"device": names.DEVICE, "card": "README.md"}[key]] = "0" * 64

    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    edit(directory / "_SUCCESS", change)
    (directory / "data" / "train-00002.tar").unlink()
    before = files(directory)
    assert cli.main(["verify", str(directory), "--repair"]) == 1
    assert "and it cannot be made again; _SUCCESS is left as it was" in capsys.readouterr().out
    after = files(directory)
    assert after.pop("data/train-00002.tar") == files(made)["data/train-00002.tar"]
    assert after == before


def test_a_root_that_cannot_be_read_is_kept_until_somebody_deletes_it(tmp_path, made, capsys):
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    (directory / "_SUCCESS").write_text("{")
    (directory / "README.md").unlink()
    before = files_and_root(directory)
    assert cli.main(["verify", str(directory), "--repair"]) == 2
    assert generate(directory, made.parent / "rows.txt", open_run(made).plan.models["model"]) == 1
    said = capsys.readouterr().err
    assert said.count("_SUCCESS differs from what the run wrote, so it proves nothing") == 2
    assert files_and_root(directory) == before
    (directory / "_SUCCESS").unlink()
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    assert files(directory) == files(made)


def files_and_root(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*") if path.is_file()}


def test_a_repair_with_different_bytes_changes_nothing(tmp_path, made, capsys):
    """As on other hardware: the root and the marker have other hashes than this machine's bytes."""
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    forge(directory)
    run = open_run(directory)
    ledger.finalize(run, 0.0)
    (directory / "data" / "train-00001.tar").unlink()
    before = files(directory)
    assert cli.main(["verify", str(directory), "--repair"]) == 1
    said = capsys.readouterr().out
    assert "shard 1 was remade, but its bytes differ from what _SUCCESS and its marker" in said
    assert files(directory) == before
    (directory / shards.marker_name(1)).write_text("{")
    before = files(directory)
    assert cli.main(["verify", str(directory), "--repair"]) == 1
    assert "shard 1 was remade, but its bytes differ" in capsys.readouterr().out
    assert files(directory) == before
    for name in ("_SUCCESS", shards.marker_name(1)):  # as the message says
        (directory / name).unlink()
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    assert files(directory) == files(made)


def test_a_dataset_of_an_earlier_version_is_repaired(tmp_path, made, capsys):
    """Its root has one digest for all shards."""
    directory = tmp_path / "out"
    shutil.copytree(made, directory)
    early = ("plan_id", "counts", "files_sha256")
    root = json.loads((directory / "_SUCCESS").read_text())
    text = json.dumps({name: root[name] for name in early}, indent=2) + "\n"
    (directory / "_SUCCESS").write_text(text)
    assert cli.main(["verify", str(directory)]) == 0
    forge(directory)
    capsys.readouterr()
    assert cli.main(["verify", str(directory), "--repair"]) == 1
    said = capsys.readouterr().out
    assert "_jaxdiff/done does not have the shards that _SUCCESS records" in said
    assert (directory / "_SUCCESS").read_text() == text
    (directory / shards.marker_name(1)).write_text("{")
    (directory / "README.md").unlink()
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    assert files(directory) == files(made)


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
