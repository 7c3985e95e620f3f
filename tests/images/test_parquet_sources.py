"""Images in Parquet files are found by column and row, a row group at a time, and never trusted."""

import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded, noise

from jaxdiff.checks import BadValueError
from jaxdiff.images import sources, tables

IMAGES = [encoded(noise(8, 8 + width)) for width in range(7)]
HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub(images: list[bytes | None]) -> list[dict]:
    return [{"bytes": image, "path": "x.png"} for image in images]


COLUMNS = {
    "image": pa.array(hub(IMAGES), HUB),
    "plain": pa.array(IMAGES, pa.binary()),
    "large": pa.array(IMAGES, pa.large_binary()),
    "some": pa.array([*IMAGES[:5], None, b""], pa.binary()),
    "gaps": pa.array([*hub(IMAGES[:4]), {"bytes": None, "path": "x.png"}, None, None], HUB),
    "listed": pa.array([[IMAGES[0]], IMAGES, [], None, [None], IMAGES[:2], []]),
    "hub list": pa.array([hub(IMAGES)] * 7, pa.list_(HUB)),
    "text": pa.array(["a"] * 7),
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "rows.parquet"
    pq.write_table(pa.table(COLUMNS), path, row_group_size=3)
    return tmp_path / "root"


def read(root, place: str) -> bytes:
    return sources.read(f"rows.parquet#{place}", str(root))


def refusal(root, place: str) -> str:
    with pytest.raises(BadValueError) as caught:
        read(root, place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("column", ["image", "plain", "large"])
def test_every_row_of_every_row_group_is_read(root, column):
    assert [read(root, f"{column}/{row}") for row in range(7)] == IMAGES


def test_images_in_lists_have_numbers(root):
    assert [read(root, f"listed/1/{number}") for number in range(7)] == IMAGES
    assert [read(root, f"hub list/6/{number}") for number in range(7)] == IMAGES


def test_an_address_is_the_one_that_is_written(root):
    assert str(tables.Cell("image", 5)) == "image/5"
    place = f"./rows.parquet#{tables.Cell('listed', 5, 1)}"
    assert sources.address(place, str(root)) == "rows.parquet#listed/5/1"
    assert tables.split("a/b.PARQUET#x y/3") == ("a/b.PARQUET", tables.Cell("x y", 3))
    for other in ("rows.parquet", "rows.parquet#image", "rows.parquet#image/x", "a.png#image/1"):
        assert tables.split(other) == (other, None)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("image/7", "it has 7 rows, counted from 0; correct the number"),
        ("image/999999999999999999", "it has 7 rows"),
        ("none/0", "it has no images in a column 'none'"),
        ("text/0", "it has no images in a column 'text'"),
        ("image/0/0", "its images have the form COLUMN/ROW"),
        ("listed/1", "its images have the form COLUMN/ROW/NUMBER"),
        ("listed/1/7", "there are no bytes"),
        ("listed/3/0", "there are no bytes"),
        ("listed/4/0", "there are no bytes"),
        ("some/5", "there are no bytes"),
        ("gaps/4", "there are no bytes"),
        ("gaps/5", "there are no bytes"),
        ("some/6", "is an empty file"),
    ],
)
def test_what_is_not_there_is_named(root, place, expected):
    said = refusal(root, place)
    assert said.startswith(f"image rows.parquet#{place} is ")
    assert expected in said


def test_the_file_lies_in_the_root(root, tmp_path):
    os.rename(root / "rows.parquet", tmp_path / "rows.parquet")
    assert "does not exist" in refusal(root, "image/0")
    (root / "rows.parquet").symlink_to(tmp_path / "rows.parquet")
    assert "is a link to a place outside" in refusal(root, "image/0")
    with pytest.raises(BadValueError, match="is not a path inside"):
        sources.read("../rows.parquet#image/0", str(root))
    for place, folder in (
        ("s3://bucket/rows.parquet#image/0", str(root)),
        ("rows.parquet#image/0", "s3://bucket"),
    ):
        with pytest.raises(BadValueError, match="is in a Parquet file elsewhere; copy it"):
            sources.read(place, folder)


def test_damaged_files_are_one_line(root):
    path = root / "rows.parquet"
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-100], whole[:4] + bytes(2000) + whole[2004:]):
        path.write_bytes(content)
        assert "the file is not complete Parquet (" in refusal(root, "image/0")


def test_a_new_file_is_read_anew(root):
    assert read(root, "plain/0") == IMAGES[0]
    pq.write_table(pa.table({"plain": IMAGES[1:]}), root / "rows.parquet")
    assert read(root, "plain/0") == IMAGES[1]


def test_row_groups_are_bounded(root, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES", 1000)
    assert "has images in a row group of 0 MiB; at most 0; write the" in refusal(root, "image/0")
    monkeypatch.undo()
    monkeypatch.setattr(tables, "MOST_VALUES", 2)
    assert "has images in 3 values in a row group; at most 2" in refusal(root, "image/0")
    monkeypatch.undo()
    how = {"use_dictionary": False, "column_encoding": {"plain": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"plain": IMAGES}), root / "rows.parquet", **how)
    assert "the encoding DELTA_BYTE_ARRAY; use PLAIN" in refusal(root, "plain/0")


def test_one_image_for_a_million_rows_is_held_once(root):
    image = bytes(2**20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2**20, pa.int32()), pa.array([image]))
    how = {"dictionary_pagesize_limit": 2**30, "store_schema": False}
    pq.write_table(pa.table({"image": column}), root / "rows.parquet", **how)
    before = pa.total_allocated_bytes()
    assert read(root, "image/1048575") == image  # all of them would be 1 TiB
    assert pa.total_allocated_bytes() - before < 2**26


def test_threads_share_what_is_remembered_and_forget_it_within_bounds(tmp_path, monkeypatch):
    rows = [os.urandom(2**20) for _ in range(32)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "rows.parquet", row_group_size=4)
    held = tables._Recent(3 * 2**22 + 2**12)  # three row groups
    monkeypatch.setattr(tables, "_columns", held)
    before = pa.total_allocated_bytes()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: read(tmp_path, f"image/{row}"), [*range(32)] * 2))
    assert found == rows * 2
    assert pa.total_allocated_bytes() - before < 4 * 2**22
