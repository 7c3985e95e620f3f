"""Every storage format reads back what it wrote, and reports what it cannot read."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from jaxdiff.dataset import formats, paths
from jaxdiff.dataset.formats import FORMATS, Sample


def sample(key: int, prompt: str = "ein Stern 🌟\nund mehr") -> Sample:
    values = {"string": "", "int32": 1, "int64": 2**62, "double": 7.5}
    record = {name: values[str(kind)] for name, kind in formats.RECORD_FIELDS}
    record |= {"key": f"{key:09d}", "prompt": prompt, "metadata": '{"列":[1,null,{"a":"b"}]}'}
    return Sample(record, bytes([key]) * 1000, "png")


def write(path: Path, format_: str, samples: list[Sample]) -> Path:
    writer = FORMATS[format_].writer
    file = writer(path, formats.RECORD_FIELDS)
    for one in samples:
        file.add(one)
    file.close()
    return path


@pytest.mark.parametrize("format_", FORMATS)
def test_written_images_are_read_back(tmp_path, format_):
    samples = [sample(key) for key in range(70)]  # two row groups
    read = FORMATS[format_].read
    assert list(read(write(tmp_path / "shard", format_, samples))) == samples
    assert list(read(write(tmp_path / "empty", format_, []))) == []


@pytest.mark.parametrize("format_", FORMATS)
def test_digests_are_equal_for_equal_images_only(tmp_path, format_):
    shards = [[sample(0), sample(1)]] * 2 + [[sample(0), sample(2)], [sample(0)]]
    digests = [
        paths.digest(write(tmp_path / str(n), format_, samples)) for n, samples in enumerate(shards)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("format_", FORMATS)
def test_an_incomplete_shard_is_reported(tmp_path, format_):
    path = write(tmp_path / "shard", format_, [sample(0), sample(1)])
    if format_ == "imagefolder":
        (path / "000000001.png").unlink()
    else:
        path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match="complete"):
        list(FORMATS[format_].read(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "x.png").touch(), "x.png is an unexpected file"),
        (lambda path: (path / "metadata.jsonl").unlink(), "not a complete folder of images"),
        (
            lambda path: (path / "metadata.jsonl").write_text("[]\n"),
            "not a complete folder of images",
        ),
        (
            lambda path: (path / "metadata.jsonl").write_text("{}\n"),
            "not a complete folder of images",
        ),
        (lambda path: (path / "metadata.jsonl").write_text("\xff", "latin-1"), "can't decode"),
        (lambda path: rename(path, "../000000000.png"), r"\.\./000000000.png is not image"),
        (lambda path: rename(path, "000000001.png"), "000000001.png is not image 000000000"),
    ],
)
def test_a_folder_that_differs_from_its_records_is_rejected(tmp_path, change, message):
    path = write(tmp_path / "shard", "imagefolder", [sample(0)])
    shutil.copy(path / "000000000.png", tmp_path)  # the target of a path that leaves the folder
    change(path)
    with pytest.raises(ValueError, match=message):
        list(formats.read_folder(path))


def rename(path: Path, name: str) -> None:
    record = json.loads((path / "metadata.jsonl").read_text())
    (path / "metadata.jsonl").write_text(json.dumps({**record, "file_name": name}) + "\n")


def test_an_unexpected_archive_member_is_rejected(tmp_path):
    path = write(tmp_path / "shard", "webdataset", [sample(0)])
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    with pytest.raises(ValueError, match="last image is incomplete"):
        list(formats.read_tar(path))


def test_the_digest_and_size_of_a_folder_are_those_of_its_files(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {"b.png": b"bb", "a.png": b"a", "metadata.jsonl": b"{}\n"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        assert paths.digest(folder / name) == hashlib.sha256(content).hexdigest()
    lines = sorted(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()
    )
    assert paths.digest(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert paths.size(folder) == 6
    assert paths.size(folder / "b.png") == 2


def test_delete_accepts_a_link_a_file_a_folder_or_a_missing_path(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    paths.delete(tmp_path / "link")
    assert (tmp_path / "folder" / "kept").exists()
    for _ in range(2):
        paths.delete(tmp_path / "folder" / "kept")
        paths.delete(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
