import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import files, make_plan, make_shard

from jaxdiff.dataset import ledger
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError


def problems(directory: Path) -> str:
    return "\n".join(ledger.verify(directory)[1])


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int = -700) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("format_", ["webdataset", "parquet", "imagefolder"])
@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_finished_dataset_balances(finished, format_, image_format):
    directory = finished(format=format_, image_format=image_format)
    counts, wrong = ledger.verify(directory)
    assert wrong == []
    assert counts == {
        "blank": 1,
        "rejected": 1,
        "accepted": 5,
        "planned": 9,
        "made": 9,
        "failed": 0,
    }
    assert json.loads((directory / "_SUCCESS").read_text())["counts"] == counts
    assert json.loads((directory / "run.json").read_text())["counts"] == counts
    assert not any((directory / "_jaxdiff" / "tmp").iterdir())


def test_failed_images_are_in_failed_jsonl_and_in_no_shard(finished):
    directory = finished(failing=["000000001", "000000005"])
    counts, wrong = ledger.verify(directory)
    assert wrong == []
    assert (counts["made"], counts["failed"]) == (7, 2)
    lines = [json.loads(line) for line in (directory / "failed.jsonl").read_text().splitlines()]
    assert [(line["key"], line["id"], line["line"]) for line in lines] == [
        ("000000001", "0", 1),
        ("000000005", "2", 4),
    ]
    assert {line["reason"] for line in lines} == {"not finite"}
    with tarfile.open(directory / "data" / "train-00000.tar") as tar:
        assert "000000001.png" not in tar.getnames()


def test_verify_names_a_flipped_byte(finished):
    directory = finished()
    for name in (
        "data/train-00000.tar",
        "metadata/train-00001.parquet",
        "_jaxdiff/plan/images-*.parquet",
        "_jaxdiff/plan/rejected-*.jsonl",
    ):
        copy = directory.with_name("copy")
        shutil.copytree(directory, copy)
        (path,) = copy.glob(name)
        flip(path, at=50)
        assert path.relative_to(copy).as_posix() in problems(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "name",
    [
        *("data/train-00001.tar", "metadata/train-00000.parquet", "_jaxdiff/plan/images-*.parquet"),
        *("rejected.jsonl", "failed.jsonl", "README.md", "croissant.json", "_SUCCESS"),
    ],
)
def test_verify_names_a_missing_file(finished, name):
    directory = finished()
    (path,) = directory.glob(name)
    path.unlink()
    assert f"{path.relative_to(directory)} is missing" in problems(directory)


def test_verify_explains_how_to_repair_a_shard(finished):
    directory = finished()
    (directory / "data" / "train-00001.tar").unlink()
    assert f"run `jaxdiff verify {directory} --repair` to generate it again" in problems(directory)


def test_verify_names_a_missing_marker(finished):
    directory = finished()
    (directory / "_jaxdiff" / "done" / "00001.json").unlink()
    assert "shard 1 of 3 is not finished" in problems(directory)


@pytest.mark.parametrize("name", ["data/x.tar", "metadata/.hidden", "_jaxdiff/done/9.json"])
def test_verify_names_a_stray_file(finished, name):
    directory = finished()
    (directory / name).write_bytes(b"")
    assert f"{name} does not belong to the run" in problems(directory)


@pytest.mark.parametrize("name", ["rejected.jsonl", "failed.jsonl", "README.md", "_SUCCESS"])
def test_verify_names_an_edited_report(finished, name):
    directory = finished()
    with (directory / name).open("a") as file:
        file.write("{}\n")
    assert f"{name} differs from what the run wrote" in problems(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: {name: said[name] for name in sorted(said)},
        lambda said: {**said, "sha256": dict(reversed(said["sha256"].items()))},
        lambda said: {**said, "earlier": {"7": ["0" * 64]}},
        lambda said: {**said, "files_sha256": "0" * 64},
        lambda said: {**said, "more": 1},
    ],
)
def test_verify_names_a_root_that_the_run_would_write_otherwise(finished, change):
    directory = finished()
    said = json.loads((directory / "_SUCCESS").read_text())
    (directory / "_SUCCESS").write_text(json.dumps(change(said), indent=2) + "\n")
    assert "_SUCCESS differs from what the run wrote" in problems(directory)


@pytest.mark.parametrize("name", ["notes.txt", "_jaxdiff/x", "_jaxdiff/batch/x", "_jaxdiff/plan/x"])
def test_verify_names_what_the_run_did_not_write(finished, name):
    directory = finished()
    (directory / ".git").mkdir()  # of a clone
    (directory / "gallery").mkdir()
    assert problems(directory) == ""
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("4")
    assert problems(directory) == f"{name} does not belong to the run; move it elsewhere"


def test_a_plan_whose_keys_changed_is_one_line(finished):
    directory = finished()
    path = directory / "_jaxdiff" / "plan" / "plan.json"
    for key in ("blank", "shard_ids", "models", "model", "sha256", "plan_version"):
        text = path.read_text()
        path.write_text(text.replace(f'"{key}"', f'"{key}x"'))
        with pytest.raises(InputError, match="cannot be used"):
            ledger.verify(directory)
        path.write_text(text)
    path.write_text(text.replace('"manifest": "', '"manifest": "x'))
    assert problems(directory) == "_jaxdiff/plan/plan.json differs from what the run wrote"


def test_verify_names_a_tar_cut_between_two_images(finished):
    directory = finished()
    path = directory / "data" / "train-00000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmember("000000002.json").offset
    path.write_bytes(path.read_bytes()[:third])
    (problem,) = problems(directory).splitlines()
    assert problem.startswith("data/train-00000.tar has 9216 bytes instead of ")
    assert "(image 000000002 is missing, and 1 more); run " in problem


def forge(directory: Path, name: str) -> None:
    """Updates the marker for a changed file, so that only its content reveals the change."""
    import hashlib

    content = (directory / name).read_bytes()
    marker = directory / "_jaxdiff" / "done" / "00000.json"
    body = json.loads(marker.read_text())
    body["files"][name] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    marker.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("prompt", "another", "the row of image 000000000 does not match the plan"),
        ("seed", 1, "the row of image 000000000 does not match the plan"),
        ("sha256", "0" * 64, "has a record that differs from its row"),
        ("status", "failed", "image 000000001 has a record that differs"),
    ],
)
def test_verify_names_an_edited_row_even_with_a_forged_marker(finished, column, value, found):
    directory = finished()
    name = "metadata/train-00000.parquet"
    table = pq.read_table(directory / name)
    rows = table.to_pylist()
    rows[0][column] = value
    pq.write_table(pa.Table.from_pylist(rows, table.schema), directory / name)
    forge(directory, name)
    assert found in problems(directory)


def test_verify_checks_the_images_even_with_a_forged_marker(finished):
    directory = finished()
    name = "data/train-00000.tar"
    with tarfile.open(directory / name) as tar:
        second = tar.getmember("000000001.png").offset_data
    flip(directory / name, second + 60)
    forge(directory, name)
    assert "image 000000001 has a file that does not match its sha256" in problems(directory)


def test_finalize_rejects_an_incomplete_dataset(tmp_path, manifest, tiny_checkpoint):
    directory = tmp_path / "out"
    run = make_plan(directory, manifest, tiny_checkpoint, images_per_shard=4, batch_size=2)
    make_shard(run, 0)
    assert ledger.todo(run) == [1, 2]
    with pytest.raises(ledger.IncompleteError, match="2 of 3 shards are not finished"):
        ledger.finalize(run, 0.0)
    make_shard(run, 1)
    make_shard(run, 2)
    flip(directory / "data" / "train-00001.tar")
    with pytest.raises(ledger.IncompleteError, match=r"data/train-00001\.tar has changed"):
        ledger.finalize(run, 0.0)
    assert not (directory / "_SUCCESS").exists()


def test_finalize_may_be_repeated(finished):
    directory = finished()
    before, markers = files(directory), read_all(directory / "_jaxdiff" / "done")
    (directory / "_SUCCESS").unlink()
    ledger.finalize(open_run(directory), 0.0)
    assert files(directory) == before
    assert read_all(directory / "_jaxdiff" / "done") == markers
    assert ledger.verify(directory)[1] == []


def test_verify_needs_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no jaxdiff run"):
        ledger.verify(tmp_path)


@pytest.mark.parametrize("wrong", [["data/train-00000.tar"], {}, {"data/train-00000.tar": []}, 7])
def test_a_marker_with_files_of_another_form_is_damaged(finished, wrong):
    directory = finished()
    path = directory / "_jaxdiff" / "done" / "00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": wrong}))
    assert "00000.json is damaged or belongs to another plan" in problems(directory)
