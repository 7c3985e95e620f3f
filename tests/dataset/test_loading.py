"""The datasets open with the tools that people use."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import webdataset

os.environ["HF_HUB_OFFLINE"] = "1"  # read when datasets is imported
import datasets
from making import pixels_of

from jaxdiff.dataset import plan as plans


def test_shards_open_with_webdataset(finished):
    directory = finished()
    urls = [str(path) for path in sorted((directory / "data").iterdir())]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [f"{key:09d}" for key in range(9)]
    planned = plans.read_shard(directory, plans.load(directory), 1)
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
    ("format_", "image_format", "column"),
    [("webdataset", "png", "png"), ("webdataset", "jpeg", "jpg"), ("parquet", "webp", "image")],
)
def test_load_dataset_finds_images_and_metadata(
    finished, tmp_path, format_, image_format, column, streaming
):
    directory = finished(format=format_, image_format=image_format)
    how = {"split": "train", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    rows = list(datasets.load_dataset(str(directory), **how))
    assert len(rows) == 9
    assert rows[0][column].size == (16, 8)
    records = [row["json"] if format_ == "webdataset" else row for row in rows]
    assert records[4]["prompt"] == "ein grüner Stern 🌟"
    metadata = [record["metadata"] for record in records]
    if format_ == "parquet":
        metadata = [json.loads(text) for text in metadata]
    # Columns of several types, and of some rows only, are carried through as they are.
    assert metadata[4:7] == [
        {"note": None},
        {"note": "x"},
        {"note": 3, "tags": ["a", {"b": 1}]},
    ]
    tables = str(directory / "metadata" / "*.parquet")
    table = list(datasets.load_dataset("parquet", data_files=tables, **how))
    assert [row["pixel_sha256"] for row in table] == [r["pixel_sha256"] for r in records]


@pytest.mark.parametrize("format_", ["webdataset", "parquet"])
def test_croissant_names_files_and_columns_that_are_there(finished, format_):
    directory = finished(format=format_)
    description = json.loads((directory / "croissant.json").read_text())
    for files in description["distribution"]:
        assert len(list(directory.glob(files["includes"]))) == 3
    columns = set(pd.read_parquet(directory / "metadata").columns)
    (records,) = description["recordSet"]
    assert {field["source"]["extract"]["column"] for field in records["field"]} <= columns
