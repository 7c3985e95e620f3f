"""Rows of Parquet may bring their images along: the Hub's datasets and our own are manifests."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdiff import cli
from jaxdiff.dataset import run as runs


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def records(output: Path) -> list[dict]:
    return pq.read_table(output / "metadata").to_pylist()


@pytest.fixture
def job(tmp_path, tiny_checkpoint):
    """Runs `generate` with a manifest; the output is a folder of this name."""

    def job(manifest, output: str = "out", *more: str) -> int:
        said = {"manifest": manifest, "output": tmp_path / output, "model": tiny_checkpoint}
        options = [f"--{name}={value}" for name, value in {**said, "steps": 2}.items()]
        return cli.main(["generate", *options, *more])

    return job


def test_a_dataset_of_the_hub_makes_the_images_of_the_same_files(job, generate, tmp_path):
    made = datasets.Dataset.from_dict(
        {"image": [picture(seed) for seed in range(5)], "text": [f"{n} rings" for n in range(5)]},
        datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    made.to_parquet(tmp_path / "rows.parquet", batch_size=2)
    assert pq.ParquetFile(tmp_path / "rows.parquet").num_row_groups > 1
    assert job(tmp_path / "rows.parquet", "out", "--prompt-column=text") == 0
    found = records(tmp_path / "out")
    assert [row["init_image"] for row in found] == [f"rows.parquet#image/{n}" for n in range(5)]
    assert [row["metadata"] for row in found] == ["{}"] * 5
    for number, row in enumerate(made.with_format("arrow")["image"].to_pylist()):
        (tmp_path / f"{number}.png").write_bytes(row["bytes"])
    rows = [{"prompt": f"{n} rings", "image": f"{n}.png"} for n in range(5)]
    assert generate(rows, "--steps=2", output="files") == 0
    same = ("pixel_sha256", "init_image_sha256", "seed")
    files = records(tmp_path / "files")
    assert [[row[n] for n in same] for row in found] == [[row[n] for n in same] for row in files]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("noisy")
def test_a_row_that_changes_after_planning_fails_alone(job, tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    images = [png(seed) for seed in range(5)]
    pq.write_table(pa.table({"prompt": ["a ring"] * 5, "image": images}), path)
    begin = runs.begin

    def planned(*said):
        run = begin(*said)
        table = {"prompt": ["a ring"] * 5, "image": [*images[:3], png(9), images[4]]}
        pq.write_table(pa.table(table), path)
        return run

    monkeypatch.setattr(runs, "begin", planned)
    assert job(path) == 3
    (failed,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert failed["reason"] == "rows.parquet#image/3 has changed since the job was planned"
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
