"""tools/score_shapes.py: a manifest out, and a finished dataset back as a table of scores."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes import Caption, Group

ROOT = Path(__file__).parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "score_shapes.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def members(key: int, row: dict, pixels: np.ndarray) -> dict[str, bytes]:
    metadata = {name: value for name, value in row.items() if name != "prompt"}
    record = {"key": f"{key:09d}", "prompt": row["prompt"], "metadata": metadata}
    return {
        f"{key:09d}.png": png(pixels),
        f"{key:09d}.json": json.dumps(record).encode(),
        f"{key:09d}.txt": row["prompt"].encode(),
    }


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


def test_a_dataset_is_scored_per_tag_over_all_its_shards(tmp_path):
    star, pair = Caption((Group("star"),)), Caption((Group("star"), Group("ring")), "above")
    ring, backwards = Caption((Group("ring"),)), Caption(pair.groups[::-1], "above")
    shown = [star, star, ring, star, pair, backwards]
    asked = [star, star, star, star, pair, pair]
    for shard in (0, 1):
        both = {}
        for key in range(3 * shard, 3 * shard + 3):
            both |= members(key, shapes.row_for(asked[key]), picture(shown[key], key))
        write_shard(tmp_path / "data" / f"train-{shard:05d}.tar", both)
    done = run("score", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "| tag | prompts | images | correct | accuracy | most frequent failures |",
        "|---|---:|---:|---:|---:|---|",
        "| single_object | 1 | 4 | 3 | 0.750 | wrong shape 1 |",
        "| position | 1 | 2 | 1 | 0.500 | wrong relation 1 |",
        "| **mean of the tags** | 2 | 6 | 4 | **0.625** | |",
    ]


def test_arrays_are_scored_without_a_dataset():
    rows = [row for tag in shapes.TAGS for row in shapes.benchmark_rows(tag, 3, seed=2)]
    pairs = [(row, picture(shapes.caption_for(row), seed)) for seed, row in enumerate(rows)]
    scores = shapes.score(pairs)
    assert [tag.tag for tag in scores] == list(shapes.TAGS)
    assert [(tag.images, tag.correct) for tag in scores] == [(3, 3)] * 6
    assert shapes.overall(scores) == 1.0


ROW = shapes.row_for(Caption((Group("star"),)))
STAR = picture(Caption((Group("star"),)), 0)
BROKEN = {
    "not a readable image": members(0, ROW, STAR) | {"000000000.png": b"\x89PNG\r\n\x1a\nno"},
    "(65, 64) px": members(0, ROW, np.zeros((64, 65, 3), np.uint8)),
    "no prompt and metadata": members(0, ROW, STAR) | {"000000000.json": b'{"prompt": "a star"}'},
    "member '../1.png'": members(0, ROW, STAR) | {"../1.png": b""},
    "member '000000001.png'": {"000000001.png": bytes(2 << 20)},
    "tag must be one of": members(0, ROW | {"tag": "ocr"}, STAR),
    "class 'dog'": members(0, ROW | {"include": [{"class": "dog", "count": 1}]}, STAR),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_scored_is_one_clear_line(tmp_path, message):
    write_shard(tmp_path / "data" / "train-00000.tar", BROKEN[message])
    done = run("score", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_shards_and_half_a_shard_are_one_clear_line(tmp_path):
    done = run("score", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no data/*.tar" in done.stderr
    shard = tmp_path / "data" / "train-00000.tar"
    write_shard(shard, members(0, ROW, STAR))
    shard.write_bytes(shard.read_bytes()[:700])
    done = run("score", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not a whole tar file" in done.stderr
