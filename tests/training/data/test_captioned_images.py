"""Captioned images are the same in every form, and errors name the file in one line."""

import io
import json
import shutil
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from captioned import (
    SIZES,
    WRITERS,
    caption,
    encoded,
    picture,
    write_folder,
    write_parquet,
    write_tar,
)
from making import make_plan, make_shard, pixels_of
from PIL import Image

from jaxdiff.dataset import ledger
from jaxdiff.dataset.paths import delete
from jaxdiff.errors import InputError
from jaxdiff.images import decoding
from jaxdiff.training.data import files, open_examples
from jaxdiff.training.recipe import Data


def opened(folder: Path, captions: str = ""):
    return open_examples(Data(path=str(folder), captions=captions))


def refusal(folder: Path, captions: str = "") -> str:
    with pytest.raises(InputError) as caught:
        opened(folder, captions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_images(stored, form):
    examples = opened(stored[form])
    assert len(examples) == len(SIZES)
    assert examples.sizes.dtype == np.int32
    np.testing.assert_array_equal(examples.sizes, SIZES)
    order = np.random.default_rng(0).permutation(len(SIZES)).tolist()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(examples.pixels, order))
    for number, pixels in zip(order, found, strict=True):
        np.testing.assert_array_equal(pixels, picture(number))
        assert examples.caption(number) == caption(number)


@pytest.mark.parametrize("format_", ["webdataset", "parquet", "imagefolder"])
def test_a_generated_dataset_is_read_in_each_of_its_formats(tmp_path, tiny_checkpoint, format_):
    manifest = tmp_path / "rows.txt"
    manifest.write_text("a red circle\na star\ntwo rings\n", "utf-8")
    directory = tmp_path / "dataset"
    expected = {"format": format_, "images_per_shard": 2, "batch_size": 2, "num_images": 2}
    run = make_plan(directory, manifest, tiny_checkpoint, **expected)
    make_shard(run, 0)
    assert "is not finished" in refusal(directory)
    for shard in (1, 2):
        make_shard(run, shard, failing=("000000003",))
    ledger.finalize(run, 0.0)
    stray = directory / "data/train-00009.tar"
    stray.write_bytes(b"no marker names it")
    examples = opened(directory)
    planned = [
        image for shard in range(3) for image in run.planned(shard) if image.key != "000000003"
    ]
    assert len(examples) == len(planned) == 5
    for number, image in enumerate(planned):
        np.testing.assert_array_equal(examples.pixels(number), pixels_of(image))
        assert examples.caption(number) == image.request.prompt
    delete(
        directory / "data/train-00001"
        if format_ == "imagefolder"
        else next((directory / "data").glob("train-00001.*"))
    )
    assert "jaxdiff verify" in refusal(directory)


def test_a_caption_column_can_be_named(tmp_path):
    rows = [{"file_name": f"pictures/{n}.png", "text": "no", "tags": f"t{n}"} for n in range(12)]
    write_folder(tmp_path / "folder", rows)
    assert opened(tmp_path / "folder", "tags").caption(3) == "t3"
    image = encoded(picture(0))
    write_tar(tmp_path / "tar/a.tar", {"0.png": image, "0.txt": b"short", "0.long": b"long"})
    assert opened(tmp_path / "tar").caption(0) == "short"
    assert opened(tmp_path / "tar", "long").caption(0) == "long"
    assert "no text in cap" in refusal(tmp_path / "tar", "cap")
    write_parquet(tmp_path / "parquet", column="tags")
    assert opened(tmp_path / "parquet", "tags").caption(3) == caption(3)
    assert "'label, image, tags'" in refusal(tmp_path / "parquet")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../b.png", "C:\\x.png", "a\0b", "", None, 3]
)
def test_file_names_cannot_leave_the_folder(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(encoded(picture(0)))
    write_folder(tmp_path / "in", [{"file_name": name, "text": "x"}])
    assert "metadata.jsonl line 1" in refusal(tmp_path / "in")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"file_name": "0.png"}', "no text in text or caption or prompt"),
        ('{"file_name": "0.png", "text": "  "}', "has no caption"),
        ('{"file_name": "0.png", "text": ["a"]}', "has no caption"),
        ('{"file_name": "0.png", "text": "a\\u0000"}', "NUL"),
        ('{"file_name": "gone.png", "text": "a"}', "gone.png cannot be read"),
        ('{"file_name": "1.png", "text": "a"}', "no row for 0.png"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, line, expected):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(encoded(picture(0)))
    good = json.dumps({"file_name": "1.png", "text": "one"})
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n", "utf-8")
    message = refusal(tmp_path)
    assert expected in message
    assert "metadata.jsonl" in message


def one_image(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "0.png").write_bytes(content)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n', "utf-8")
    return folder


def test_images_that_cannot_be_decoded_are_named(tmp_path):
    assert "0.png is not a readable image" in refusal(one_image(tmp_path / "text", b"no image"))
    assert "0.png is not a readable image" in refusal(one_image(tmp_path / "empty", b""))
    whole = encoded(picture(0))
    cut = opened(one_image(tmp_path / "cut", whole[: len(whole) // 2]))
    with pytest.raises(InputError, match=r"0\.png is not a readable image"):
        cut.pixels(0)
    deep = opened(one_image(tmp_path / "deep", encoded(Image.new("I;16", (8, 8), 40000))))
    with pytest.raises(InputError, match="save it with 8 bits"):
        deep.pixels(0)
    changed = opened(one_image(tmp_path / "changed", whole))
    (tmp_path / "changed/0.png").write_bytes(encoded(picture(1)))
    with pytest.raises(InputError):
        changed.pixels(0)
    (tmp_path / "changed/0.png").unlink()
    with pytest.raises(InputError, match="can no longer be read"):
        changed.pixels(0)


def test_a_gigapixel_image_is_rejected_by_its_header(tmp_path):
    huge = bytearray(encoded(picture(0)))
    huge[16:24] = (50_000).to_bytes(4, "big") * 2  # in the PNG header, before its checksum
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    assert "0.png" in refusal(one_image(tmp_path / "huge", bytes(huge)))
    side = int(decoding.MOST_PX**0.5) + 8
    wide = encoded(Image.new("1", (side, side)))
    assert "make it smaller" in refusal(one_image(tmp_path / "large", wide))


def test_orientation_and_transparency_are_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise
    turned = opened(one_image(tmp_path / "turned", encoded(picture(1), "png", exif=exif)))
    assert turned.sizes.tolist() == [[32, 16]]
    np.testing.assert_array_equal(turned.pixels(0), np.rot90(picture(1), -1))
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert np.all(opened(one_image(tmp_path / "clear", encoded(clear))).pixels(0) == 255)


def webdataset_keys(path: Path) -> list[str]:
    """Returns the keys of a shard's samples, as webdataset reads them."""
    samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [sample["__key__"] for sample in samples]


def test_a_member_that_is_there_twice_is_rejected_as_webdataset_does(tmp_path):
    path, content = tmp_path / "0.tar", encoded(picture(0))
    with tarfile.open(path, "w") as tar:
        for name, body in (("0.png", content), ("0.txt", b"one"), ("0.txt", b"two")):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    with pytest.raises(ValueError, match="duplicate file name"):
        webdataset_keys(path)
    assert "0.tar contains '0.txt' twice" in refusal(tmp_path)


def test_hidden_members_are_no_samples_as_in_webdataset(tmp_path):
    path = tmp_path / "0.tar"
    members = {"0.png": encoded(picture(0)), "0.txt": b"one"}
    write_tar(path, members | {"._0.png": b"AppleDouble", "._0.txt": b"AppleDouble"})
    assert webdataset_keys(path) == ["0"]
    examples = opened(tmp_path)
    assert [examples.caption(index) for index in range(len(examples))] == ["one"]


def test_hidden_images_of_a_folder_need_no_row(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "._0.png").write_bytes(b"AppleDouble")
    assert len(opened(tmp_path)) == len(SIZES)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"0.txt": "\ufeffein Stern".encode()}, "ein Stern"),
        ({"0.json": b'\xef\xbb\xbf{"text": "a"}'}, "a"),
        ({"0.txt": "Grün".encode("latin-1")}, "0.txt is not UTF-8"),
        ({"0.json": b'{"text": "\xfc"}'}, "0.json is not UTF-8"),
        ({"0.json": b'{"text": "a", "text": "b"}'}, "0.json is not a JSON object"),
    ],
)
def test_captions_are_utf8_without_a_mark(tmp_path, members, expected):
    write_tar(tmp_path / "0.tar", {"0.png": encoded(picture(0))} | members)
    if " is " in expected:
        assert expected in refusal(tmp_path).replace("'", "")
    else:
        assert opened(tmp_path).caption(0) == expected


def test_a_damaged_shard_is_named(tmp_path, stored):
    folder = tmp_path / "tars"
    shutil.copytree(stored["webdataset"], folder)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    assert "00001.tar" in refusal(folder)
    (folder / "00001.tar").write_bytes(b"no archive, but long enough to be one" * 40)
    assert "00001.tar is not a valid tar archive" in refusal(folder)
    write_tar(folder / "00001.tar", {"9.txt": b"alone"})
    assert "'9' has no image" in refusal(folder)
    write_tar(folder / "00001.tar", {"9.png": encoded(picture(0))})
    assert "'9' has no caption" in refusal(folder)
    write_tar(folder / "00001.tar", {"9.png": encoded(picture(0)), "9.json": b"[]"})
    assert "9'.json is not a JSON object" in refusal(folder)


def test_an_invalid_parquet_file_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "gaps", captions=[*map(caption, range(8)), None, "", "x", "y"])
    assert "train-00001-of-00002.parquet row 2 has no caption" in refusal(tmp_path / "gaps")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.parquet").write_bytes(b"PAR1 and nothing more")
    assert "a.parquet is not a valid Parquet file" in refusal(tmp_path / "broken")
    paths = pa.array(
        [{"bytes": None, "path": "a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": paths, "text": ["x"]}), tmp_path / "broken/a.parquet")
    assert "row 1 has no embedded image" in refusal(tmp_path / "broken")
    pq.write_table(pa.table({"image": ["a.png"], "text": ["x"]}), tmp_path / "broken/a.parquet")
    assert "no image column with image bytes" in refusal(tmp_path / "broken")
    write_parquet(tmp_path / "large")
    monkeypatch.setattr(files, "CACHE_BYTES", 1000)
    assert "row_group_size" in refusal(tmp_path / "large")


def test_a_folder_without_captioned_images_is_rejected(tmp_path):
    assert "image folder not found" in refusal(tmp_path / "nowhere")
    assert "docs/data.md" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").touch()
    assert "contains no images" in refusal(tmp_path)
