"""Extends a dataset: existing images stay and new ones are added; other changes are rejected."""

import json
import shutil

import pytest
from making import files

from jaxdiff import cli
from jaxdiff.dataset import names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from jaxdiff.images import image_files

FIRST = [{"prompt": "a red circle", "id": "a"}, {"prompt": "a star", "id": "b", "num_images": 3}]
MORE = [*FIRST, {"prompt": "a blue square", "id": "c"}, "broken"]


pytestmark = pytest.mark.usefixtures("noisy")


@pytest.fixture
def finished(noise):
    return noise


@pytest.fixture
def write(manifest):
    """Replaces the rows of the job's manifest."""

    def write(rows: list) -> None:
        manifest.write_text(text(rows))

    return write


def text(rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "\n".join(lines) + "\n"


def pixels(directory) -> dict[tuple[str, int], str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(directory / "metadata").to_pylist()
    return {(row["id"], row["image_index"]): row["pixel_sha256"] for row in rows}


def test_a_longer_manifest_adds_images_and_keeps_existing_ones(
    tmp_path, command, capsys, write, finish
):
    directory = tmp_path / "out"
    finish(directory, manifest=text(FIRST))
    first = open_run(directory).plan
    before = {path: path.read_bytes() for path in directory.glob("data/*")}
    write(MORE)
    assert cli.main(command(directory)) == 0
    said = capsys.readouterr().err
    assert "is extended; its 1 shard will not change" in said
    assert "1 of 4 rows of" in said
    assert {path: path.read_bytes() for path in before} == before
    extended = open_run(directory).plan
    assert extended.shard_ids[:1] == first.shard_ids
    assert extended.shard_sizes == [4, 1]
    assert extended.rows == {"blank": 0, "rejected": 1, "accepted": 3}
    assert len((directory / "rejected.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in (directory / names.PLAN).iterdir()) == sorted(
        ["plan.json", *extended.sha256]
    )
    assert cli.main(["verify", str(directory)]) == 0

    assert cli.main(command(tmp_path / "fresh")) == 0
    assert pixels(directory) == pixels(tmp_path / "fresh")


def test_more_images_per_row_and_a_higher_limit_also_extend(tmp_path, command, write):
    directory = tmp_path / "out"
    write([{"prompt": "a red circle"}, {"prompt": "a star"}])
    for more in (["--limit=1"], [], ["--num-images=2"], ["--num-images=3", "--limit=5"]):
        assert cli.main(command(directory, *more)) == 0
        assert cli.main(["verify", str(directory)]) == 0
    assert sorted(pixels(directory)) == [("0", 0), ("0", 1), ("0", 2), ("1", 0), ("1", 1)]
    assert cli.main(command(tmp_path / "fresh", "--num-images=3", "--limit=5")) == 0
    assert pixels(directory) == pixels(tmp_path / "fresh")


def test_an_interrupted_job_can_be_extended(tmp_path, command, write, finish):
    directory = tmp_path / "out"
    finish(directory, manifest=text(FIRST))
    for name in ("_SUCCESS", "_jaxdiff/done/00000.json"):  # as if it had been killed
        (directory / name).unlink()
    write(MORE)
    assert cli.main(command(directory)) == 0
    assert cli.main(["verify", str(directory)]) == 0
    assert len(pixels(directory)) == 5


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{**FIRST[0], "prompt": "a ring"}, FIRST[1]], "line 1 of manifest"),
        (
            [{**FIRST[0], "seed": 3}, FIRST[1]],
            "changes image 0 of row 'a', which is already planned",
        ),
        (
            [{**FIRST[0], "note": "x"}, FIRST[1]],
            "changes image 0 of row 'a', which is already planned",
        ),
        ([{**FIRST[1], "num_images": 2}, FIRST[0]], "no longer asks for image 2 of row 'b'"),
        ([FIRST[1]], "no longer asks for image 0 of row 'a'"),
    ],
)
def test_a_manifest_that_lacks_planned_images_is_rejected(
    tmp_path, command, capsys, write, finish, rows, why
):
    directory = tmp_path / "out"
    finish(directory, manifest=text(FIRST))
    before = files(directory)
    write(rows)
    assert cli.main(command(directory)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds another run (manifest_sha256 '" in said
    assert "and cannot be extended: " in said
    assert why in said
    assert files(directory) == before
    assert cli.main(command(directory, "--num-images=2", "--steps=3")) == 2
    assert "; name another directory" in capsys.readouterr().err


def test_reordered_rows_extend_too(tmp_path, command, write, finish):
    directory = tmp_path / "out"
    finish(directory, manifest=text(FIRST))
    write(MORE[::-1])
    assert cli.main(command(directory)) == 0
    assert cli.main(["verify", str(directory)]) == 0
    assert len(pixels(directory)) == 5


@pytest.mark.parametrize("format_", ["webdataset", "parquet"])
def test_an_extended_dataset_keeps_the_name_of_its_model(
    tmp_path, command, write, tiny_checkpoint, format_
):
    directory, moved = tmp_path / "out", tmp_path / "moved"
    write(FIRST)
    assert cli.main(command(directory, f"--format={format_}")) == 0
    shutil.copytree(tiny_checkpoint, moved)
    write(MORE)
    assert cli.main(command(directory, f"--format={format_}", f"--model={moved}")) == 0
    assert cli.main(["verify", str(directory)]) == 0
    run = open_run(directory)
    for shard in run.shards:
        for sample in shards.samples(run, shards.read_marker(run, shard), run.store):
            assert sample.record["model_name"] == tiny_checkpoint.name
            text = image_files.parameters(sample.record)
            assert f", Model: {tiny_checkpoint.name}" in text
