"""Datasets open with webdataset, pandas and `datasets`."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset
from making import make_plan, make_shard, pixels_of

os.environ["HF_HUB_OFFLINE"] = "1"  # read when datasets is imported
import datasets

from jaxdiff.dataset import ledger
from jaxdiff.dataset.run import open_run

IMAGE_COLUMNS = {"webdataset": "png", "parquet": "image", "imagefolder": "image"}


@pytest.fixture
def load(tmp_path):
    """Loads images with `datasets`, sorted by key, as imagefolders come in any order."""

    def load_(*where: str, **how) -> list[dict]:
        cache = str(tmp_path / "cache")
        rows = datasets.load_dataset(*where, split="train", cache_dir=cache, **how)
        return sorted(rows, key=lambda row: row["__key__"] if "__key__" in row else row["key"])

    return load_


def records_of(rows: list[dict], format_: str) -> list[dict]:
    """Returns the images' records; the rows' other columns are objects in every format."""
    return [row["json"] for row in rows] if format_ == "webdataset" else rows


def test_shards_open_with_webdataset(finished):
    directory = finished()
    run = open_run(directory)
    urls = [str(path) for path in sorted((directory / "data").iterdir())]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [f"{key:09d}" for key in range(9)]
    planned = run.planned(1)
    for sample, image in zip(samples[4:8], planned, strict=True):
        assert (sample["png"] == pixels_of(image)).all()
        assert sample["txt"] == sample["json"]["prompt"] == image.request.prompt
        assert sample["json"]["metadata"] == json.loads(image.metadata)


def test_metadata_opens_with_pandas(finished):
    frame = pd.read_parquet(finished(failing=["000000002"]) / "metadata")
    assert list(frame["key"]) == [f"{key:09d}" for key in range(9)]
    assert list(frame["status"] == "made") == [key != 2 for key in range(9)]
    assert frame["seed"].dtype == np.int64
    assert frame.loc[4, "prompt"] == "ein grüner Stern 🌟"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("format_", "image_format"),
    [
        *(("webdataset", "png"), ("webdataset", "jpeg"), ("parquet", "webp")),
        *(("imagefolder", "png"), ("imagefolder", "webp"), ("imagefolder", "jpeg")),
    ],
)
def test_load_dataset_finds_images_and_metadata(finished, load, format_, image_format, streaming):
    directory = finished(format=format_, image_format=image_format)
    rows = load(str(directory), streaming=streaming)
    assert len(rows) == 9
    column = "jpg" if (format_, image_format) == ("webdataset", "jpeg") else IMAGE_COLUMNS[format_]
    records = records_of(rows, format_)
    run = open_run(directory)
    planned = [image for s in range(3) for image in run.planned(s)]
    for row, record, image in zip(rows, records, planned, strict=True):
        assert (record["key"], record["prompt"]) == (image.key, image.request.prompt)
        assert row[column].size == (16, 8)
        if image_format != "jpeg":
            assert (np.asarray(row[column]) == pixels_of(image)).all()
    # Columns with several types, and columns of some rows only, are kept unchanged.
    assert [record["metadata"] for record in records[4:7]] == [
        {"note": None},
        {"note": "x"},
        {"note": 3, "tags": ["a", {"b": 1}]},
    ]
    tables = str(directory / "metadata" / "*.parquet")
    table = load("parquet", data_files=tables, streaming=streaming)
    assert [row["pixel_sha256"] for row in table] == [r["pixel_sha256"] for r in records]


@pytest.mark.parametrize("format_", IMAGE_COLUMNS)
def test_failed_images_are_left_out_and_the_rest_loads(finished, load, format_):
    directory = finished(format=format_, failing=["000000000", "000000005"])
    rows = load(str(directory))
    keys = [record["key"] for record in records_of(rows, format_)]
    assert keys == [f"{key:09d}" for key in (1, 2, 3, 4, 6, 7, 8)]
    assert all(row[IMAGE_COLUMNS[format_]].size == (16, 8) for row in rows)


@pytest.mark.parametrize("format_", IMAGE_COLUMNS)
def test_a_shard_without_images_does_not_hide_the_others(finished, load, format_):
    directory = finished(format=format_, failing=[f"{key:09d}" for key in range(4)])
    keys = [record["key"] for record in records_of(load(str(directory)), format_)]
    assert keys == [f"{key:09d}" for key in range(4, 9)]


@pytest.mark.parametrize("format_", IMAGE_COLUMNS)
def test_text_of_every_kind_loads_unchanged(tmp_path, tiny_checkpoint, load, format_):
    prompts = [
        *("一只红色的猫", "قطة حمراء", "2024-01-01", '"quoted", <b> & | `code`'),
        "👩\u200d👩\u200d👧 \u200f\ufffe\uffff",
        "\x01\x1f\x7f\x85\u2028",
    ]
    rows = [{"prompt": prompt, "id": f"{n}/ü", "列": n} for n, prompt in enumerate(prompts)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = make_dataset(tmp_path / "out", manifest, tiny_checkpoint, format=format_)
    assert ledger.verify(directory)[1] == []
    records = records_of(load(str(directory)), format_)
    assert [record["prompt"] for record in records] == prompts
    assert [record["id"] for record in records] == [row["id"] for row in rows]
    assert [record["metadata"] for record in records] == [{"列": n} for n in range(len(rows))]


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
@pytest.mark.parametrize("format_", IMAGE_COLUMNS)
def test_the_card_s_example_runs(finished, tmp_path, monkeypatch, format_, image_format):
    directory = finished(format=format_, image_format=image_format, failing=["000000003"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    example = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(example.replace("DIR", str(directory)), names)
    assert (len(names["images"]), len(names["metadata"])) == (8, 9)
    if format_ == "webdataset":
        assert names["sample"]["json"]["key"] == "000000008"


def make_dataset(directory: Path, manifest: Path, checkpoint: Path, **said) -> Path:
    run = make_plan(directory, manifest, checkpoint, **said)
    for shard in run.shards:
        make_shard(run, shard)
    ledger.finalize(run, 0.0)
    return directory
