"""Control images beside captioned ones, in every storage form."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned import SIZES, caption, encoded, picture, write_tar
from PIL import Image

from jaxdiff.errors import InputError
from jaxdiff.training.data import batches, open_examples
from jaxdiff.training.data.examples import Examples
from jaxdiff.training.recipe import Data


def write_controls(folder: Path, form: str) -> str:
    """Writes captioned images with their negatives as control images; returns their column."""
    numbers = range(len(SIZES))
    images = [encoded(picture(n)) for n in numbers]
    controls = [encoded(255 - picture(n)) for n in numbers]
    if form == "webdataset":
        members = {}
        for n in numbers:
            members |= {f"{n}.png": images[n], f"{n}.edges.png": controls[n]}
            members[f"{n}.txt"] = caption(n).encode()
        write_tar(folder / "0.tar", members)
        return "edges.png"
    if form == "parquet":
        cells, others = (
            [{"bytes": each, "path": None} for each in kind] for kind in (images, controls)
        )
        table = {"image": cells, "edges": others, "text": [*map(caption, numbers)]}
        folder.mkdir()
        pq.write_table(pa.table(table), folder / "0.parquet", 5)
        return "edges"
    folder.mkdir()
    rows = []
    for n in numbers:
        (folder / f"{n}.png").write_bytes(images[n])
        (folder / f"edges{n}.png").write_bytes(controls[n])
        rows.append({"file_name": f"{n}.png", "edges": f"edges{n}.png", "text": caption(n)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "edges"


def opened(folder: Path, column: str) -> Examples:
    return open_examples(Data(path=str(folder)), column)


@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "parquet"])
def test_a_control_image_is_cut_and_mirrored_as_its_image(tmp_path, form):
    column = write_controls(tmp_path / "data", form)
    make = batches(
        opened(tmp_path / "data", column), batch_size=6, seed=1, sizes=[(16, 16)], flip=True
    )
    for step in range(4):
        made = make(step)
        # Resizing rounds an image and its negative each to the nearest.
        off = np.abs(255 - made["control"].astype(int) - made["pixels"])
        assert off.max() <= 1


@pytest.mark.parametrize(
    ("form", "column", "message"),
    [
        ("imagefolder", "depth", "metadata.jsonl line 1 has no depth; add the name of the image"),
        ("webdataset", "depth.png", r"'0' has no control image \(depth.png\); add it, or set"),
        ("parquet", "depth", "has no depth column with image bytes"),
    ],
)
def test_missing_control_images_are_named(tmp_path, form, column, message):
    write_controls(tmp_path / "data", form)
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        opened(tmp_path / "data", column)


def test_control_images_of_another_size_are_named(tmp_path):
    write_controls(tmp_path / "data", "imagefolder")
    Image.new("RGB", (20, 16)).save(tmp_path / "data/edges0.png")
    examples = opened(tmp_path / "data", "edges")
    with pytest.raises(
        InputError, match=r"0\.png: its control image has 20x16 pixels, the image 16x16"
    ):
        examples.control(0)
