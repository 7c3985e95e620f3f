"""tools/score_shapes.py: a manifest out, and a finished dataset back as a table of scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from making import FACTS, make_plan

from jaxdiff.dataset import ledger
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import Caption, Group

ROOT = Path(__file__).parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "score_shapes.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def picture(caption: Caption, seed: int) -> np.ndarray:
    return shapes.render(shapes.scene_for(caption, np.random.default_rng(seed)))


def test_the_manifest_has_every_tag_and_ids_of_its_own(tmp_path):
    done = run("manifest", "--per-tag", 30, "--images", 4, "--seed", 5, "--output", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 6 * 30
    assert {row["num_images"] for row in rows} == {4}
    for tag in shapes.TAGS:
        benchmark = [{k: v for k, v in r.items() if k not in ("id", "num_images")} for r in rows]
        assert [r for r in benchmark if r["tag"] == tag] == shapes.benchmark_rows(tag, 30, 5)


STAR, RING = Caption((Group("star"),)), Caption((Group("ring"),))
PAIR = Caption((Group("star"), Group("ring")), "above")
BACKWARDS = Caption(PAIR.groups[::-1], "above")


@pytest.fixture
def dataset(tmp_path, tiny_checkpoint):
    """Makes a dataset: `dataset(asked, shown, format="parquet")` returns its directory.

    `asked` are manifest rows; `shown` the captions of the pictures made for them, None for an image
    that failed. A `finished` of False leaves out what is done last.
    """

    def make(asked: list[dict], shown: list, finished: bool = True, **said) -> Path:
        directory, manifest = tmp_path / "dataset", tmp_path / "rows.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in asked))
        said = {"width": 64, "height": 64, "images_per_shard": 3, "batch_size": 1, **said}
        plan = make_plan(directory, manifest, tiny_checkpoint, **said)
        for shard in range(len(plan.shard_sizes)):
            with shards.Attempt(directory, plan, shard) as attempt:
                for image in plans.read_shard(directory, plan, shard):
                    caption = shown[int(image.key)]
                    if caption is None:
                        attempt.add_failed(image, "not finite")
                    else:
                        pixels = picture(caption, int(image.key))
                        attempt.add(shards.encode(image, pixels, plan))
                attempt.commit(FACTS)
        if finished:
            ledger.finalize(directory, plan, 0.0)
        return directory

    return make


def refusal(directory: Path) -> str:
    """The one line that scoring this directory ends in."""
    done = run("score", directory)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_dataset_is_scored_per_tag_over_all_its_shards(dataset, kind):
    asked = [shapes.row_for(caption) for caption in (STAR, STAR, STAR, STAR, PAIR, PAIR)]
    done = run("score", dataset(asked, [STAR, STAR, RING, STAR, PAIR, BACKWARDS], format=kind))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "| tag | prompts | images | correct | accuracy | most frequent failures |",
        "|---|---:|---:|---:|---:|---|",
        "| single_object | 1 | 4 | 3 | 0.750 | wrong shape 1 |",
        "| position | 1 | 2 | 1 | 0.500 | wrong relation 1 |",
        "| **mean of the tags** | 2 | 6 | 4 | **0.625** | |",
    ]


def test_images_that_failed_are_wrong(dataset):
    asked = [shapes.row_for(STAR)] * 4
    done = run("score", dataset(asked, [None, STAR, RING, None]))
    assert done.stdout.splitlines()[2] == (
        "| single_object | 1 | 4 | 1 | 0.250 | not made 2, wrong shape 1 |"
    )


def test_arrays_are_scored_without_a_dataset():
    rows = [row for tag in shapes.TAGS for row in shapes.benchmark_rows(tag, 3, seed=2)]
    pairs = [(row, picture(shapes.caption_for(row), seed)) for seed, row in enumerate(rows)]
    scores = shapes.score(pairs)
    assert [tag.tag for tag in scores] == list(shapes.TAGS)
    assert [(tag.images, tag.correct) for tag in scores] == [(3, 3)] * 6
    assert shapes.overall(scores) == 1.0


ROW = shapes.row_for(STAR)
FOREIGN_ROWS = {
    "tag must be one of": ROW | {"tag": "ocr"},
    "class 'dog'": ROW | {"include": [{"class": "dog", "count": 1}]},
    "include None": {"prompt": "a star"},
}


@pytest.mark.parametrize("message", FOREIGN_ROWS)
def test_rows_of_another_benchmark_are_one_clear_line(dataset, message):
    assert message in refusal(dataset([FOREIGN_ROWS[message]], [STAR]))


def test_images_of_another_size_are_one_clear_line(dataset):
    assert "another size than 64 x 64" in refusal(dataset([ROW | {"width": 72}], [STAR]))


def test_no_dataset_and_an_unfinished_one_are_one_clear_line(dataset, tmp_path):
    assert f"{tmp_path} holds no jaxdiff run" in refusal(tmp_path)
    assert "is not finished" in refusal(dataset([ROW], [STAR], finished=False))


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_half_a_shard_is_one_clear_line(dataset, kind):
    directory = dataset([ROW], [STAR], format=kind)
    (shard,) = (directory / "data").iterdir()
    shard.write_bytes(shard.read_bytes()[:700])
    assert str(shard) in refusal(directory)
