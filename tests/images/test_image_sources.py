"""What rows name is read only inside the manifest's folder, and every failure is one clear line."""

import io
import os
import re
import socket
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from pictures import animated, encoded, noise, png
from PIL import Image

from jaxdiff.checks import BadValueError
from jaxdiff.images import archives, sources

CONTENT = encoded(noise(8, 8))


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "secret.png").write_bytes(CONTENT)
    (tmp_path / "root/cats").mkdir(parents=True)
    (tmp_path / "root/cats/1.png").write_bytes(CONTENT)
    return tmp_path / "root"


def refusal(function, *arguments) -> str:
    with pytest.raises(BadValueError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "said", ["cats/1.png", "./cats/1.png", "cats//1.png", "dogs/../cats/1.png", "ROOT/cats/1.png"]
)
def test_a_path_becomes_relative_to_the_root(root, said):
    found = sources.address(said.replace("ROOT", str(root)), str(root))
    assert found == "cats/1.png"
    assert sources.address(found, str(root)) == found
    assert sources.read(found, str(root)) == CONTENT


def test_an_absolute_path_may_go_through_a_link_to_the_root(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert sources.address(f"{root}/cats/1.png", str(tmp_path / "link")) == "cats/1.png"
    assert sources.address(f"{tmp_path}/link/cats/1.png", str(tmp_path / "link")) == "cats/1.png"


@pytest.mark.parametrize(
    "url",
    [
        *("gs://b/a b.png", "gcs://b/1.png", "s3://b/1.png", "s3a://b/1.png", "az://c/1.png"),
        *("abfs://c@a.dfs.core.windows.net/1.png", "abfss://c/1.png"),
    ],
)
def test_a_url_stays_as_it_is(root, url):
    assert sources.address(url, str(root)) == url
    assert sources.address(url, "gs://bucket/prompts") == url


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", "image is empty"),
        (" ", "image is empty"),
        (None, "image must be text, not None"),
        (7, "image must be text, not 7"),
        ("a\0.png", "NUL"),
        ("a\n.png", "control character"),
        ("a\x1b[31m.png", "control character"),
        ("a\udc80.png", "not UTF-8"),
        ("a" * 5000, "5000 characters"),
        ("../secret.png", "'../secret.png' is not a path inside ROOT; move the file there"),
        ("cats/../../secret.png", "not a path inside ROOT"),
        ("..", "not a path inside ROOT"),
        ("/etc/passwd", "not a path inside ROOT"),
        ("//etc/passwd", "not a path inside ROOT"),
        ("ROOT/../secret.png", "not a path inside ROOT"),
        ("ROOT2/1.png", "not a path inside ROOT"),
        (".", "is a folder"),
        ("ROOT", "is a folder"),
        ("file:///etc/passwd", "has the scheme file://; use one of gs, gcs, s3"),
        ("http://a.org/1.png", "has the scheme http://"),
        ("https://a.org/1.png", "has the scheme https://"),
        ("memory://1.png", "has the scheme memory://"),
        ("gs://b/1.zip::file:///etc/passwd", 'contains "::"'),
    ],
)
def test_what_is_no_address_is_refused(root, said, expected):
    said = said.replace("ROOT", str(root)) if isinstance(said, str) else said
    for function in (sources.address, sources.read):  # a plan may have been edited
        assert expected.replace("ROOT", str(root)) in refusal(function, said, str(root))


@pytest.mark.parametrize("said", ["/cats/1.png", "../1.png", "a/../../1.png", "a::b.png"])
def test_a_remote_root_is_not_left_either(said):
    assert said in refusal(sources.address, said, "gs://bucket/prompts")


def test_a_link_may_not_lead_out_of_the_root(root, tmp_path):
    (root / "inside.png").symlink_to("cats/1.png")
    assert sources.read("inside.png", str(root)) == CONTENT
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "circle.png").symlink_to("circle.png")
    (root / "broken.png").symlink_to("gone.png")
    for name in ("out.png", "up/secret.png"):
        message = refusal(sources.read, name, str(root))
        assert message.startswith(f"image {name} is a link to a place outside {root};")
    assert "circle.png in" in refusal(sources.read, "circle.png", str(root))
    assert "broken.png does not exist" in refusal(sources.read, "broken.png", str(root))


@pytest.mark.parametrize("name", ["gone.png", "cats/1.png/2.png", "cats/gone/1.png"])
def test_a_missing_file_is_named(root, name):
    assert refusal(sources.read, name, str(root)) == (
        f"image {name} does not exist in {root}; add it or correct the path"
    )


def test_only_regular_files_are_read(root):
    os.mkfifo(root / "pipe.png")  # opening it would wait forever
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:
        os.chdir(root)  # the names of sockets are short
        server.bind("socket.png")
    finally:
        os.chdir(here)
        server.close()
    for name in ("pipe.png", "socket.png"):
        assert f"image {name} is a pipe or a device" in refusal(sources.read, name, str(root))
    assert "image null is a pipe or a device" in refusal(sources.read, "null", "/dev")
    assert "image cats is a folder; name a file" in refusal(sources.read, "cats", str(root))


def test_the_size_is_bounded(root):
    with (root / "large.png").open("wb") as file:
        file.truncate(sources.MOST_BYTES + 1)  # takes no place on the disk
    assert refusal(sources.read, "large.png", str(root)) == (
        "image large.png has more than 128 MiB; make the file smaller"
    )
    (root / "empty.png").touch()
    assert "image empty.png is an empty file" in refusal(sources.read, "empty.png", str(root))


def test_what_may_not_be_read_or_is_too_long_is_named(root, monkeypatch):
    assert "File name too long" in refusal(sources.read, "a" * 300, str(root))

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # tests may run as root, who may read everything
    assert "image cats/1.png in" in refusal(sources.read, "cats/1.png", str(root))
    assert "chmod" in refusal(sources.read, "cats/1.png", str(root))


@pytest.fixture
def bucket():
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/cats/1.png", CONTENT)
    memory.pipe("/bucket/empty.png", b"")
    yield "memory://bucket/"
    memory.rm("/bucket", recursive=True)


def test_a_remote_folder_is_read(bucket, monkeypatch):
    assert sources.read("cats/1.png", bucket) == CONTENT
    assert "image gone.png in memory://bucket/ does not exist or" in refusal(
        sources.read, "gone.png", bucket
    )
    assert "is a folder" in refusal(sources.read, "cats", bucket)
    assert "is an empty file" in refusal(sources.read, "empty.png", bucket)
    monkeypatch.setattr(sources, "MOST_BYTES", len(CONTENT) - 1)
    assert "make the file smaller" in refusal(sources.read, "cats/1.png", bucket)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (PermissionError("403"), "may not be read with these credentials"),
        (TimeoutError(), "did not arrive in 30 seconds"),
        (RuntimeError("one\ntwo"), r"cannot be read \(RuntimeError: one two\)"),
    ],
)
def test_problems_of_a_remote_folder_are_one_line(bucket, monkeypatch, problem, expected):
    def fails(*_, **__):
        raise problem

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fails)
    assert re.search(expected, refusal(sources.read, "cats/1.png", bucket))


def test_problems_before_the_connection_are_one_line(root, monkeypatch):
    assert "Protocol not known" in refusal(sources.read, "1.png", "nowhere://bucket")

    def fails(_):
        raise OSError("no credentials\nfound")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fails)
    assert "(OSError: no credentials found)" in refusal(sources.read, "gs://b/1.png", str(root))


def test_a_missing_package_is_named(root, monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert refusal(sources.read, "s3://bucket/1.png", str(root)) == (
        "image s3://bucket/1.png cannot be read because a package is missing: pip install s3fs"
    )


def test_an_image_is_decoded():
    np.testing.assert_array_equal(sources.opened(CONTENT, "1.png"), noise(8, 8))


def test_white_in_a_mask_is_what_is_repainted():
    colors = {"white": 255, "black": 0, "#808080": 128}
    for color, level in colors.items():
        for mode in ("RGB", "L", "RGBA"):
            content = encoded(Image.new("RGB", (4, 2), color).convert(mode))
            np.testing.assert_array_equal(sources.mask(content, "m"), np.full((2, 4), level))
    clear = Image.new("RGBA", (4, 2), (255, 255, 255, 0))
    assert not sources.mask(encoded(clear), "m").any()
    bits = encoded(Image.new("1", (4, 2), 1))
    np.testing.assert_array_equal(sources.mask(bits, "m"), np.full((2, 4), 255))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (animated("png"), "a is animated (3 frames); save one frame"),
        (animated("webp"), "a is animated (3 frames); save one frame"),
        (animated("gif"), "a is not a readable image (none of JPEG, PNG, WEBP, BMP)"),
        (CONTENT[:100], "a is not a readable image"),
        (b"no image", "a is not a readable image"),
        (png(50_000, 50_000, 8, 2, b""), "a is not a readable image"),
        (encoded(Image.new("I;16", (8, 8), 40000)), "save it with 8 bits per channel"),
    ],
    ids=["apng", "webp", "gif", "truncated", "text", "bomb", "16 bit"],
)
def test_bad_images_and_masks_are_bad_values(content, expected):
    assert expected in refusal(sources.opened, content, "a")
    assert expected in refusal(sources.mask, content, "a")


def archive(path, members: dict[str, bytes], **how) -> None:
    with tarfile.open(path, **{"mode": "w", **how}) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_file_in_an_archive_is_read(tmp_path):
    members = {"x/1.png": CONTENT, "x/2.png": CONTENT * 2, "x/1#2.png": CONTENT * 3}
    archive(tmp_path / "a.tar", members)
    for name, content in members.items():
        assert sources.address(f"./a.tar#{name}", str(tmp_path)) == f"a.tar#{name}"
        assert sources.read(f"a.tar#{name}", str(tmp_path)) == content
    assert "is not in the archive" in refusal(sources.read, "a.tar#x/3.png", str(tmp_path))
    assert "does not exist" in refusal(sources.read, "b.tar#x/1.png", str(tmp_path))
    archive(tmp_path / "a.tar", {"x/1.png": CONTENT * 4})  # no index of the old file is used
    assert sources.read("a.tar#x/1.png", str(tmp_path)) == CONTENT * 4


def test_archives_are_not_trusted(tmp_path, monkeypatch):
    archive(tmp_path / "packed.tar", {"1.png": CONTENT}, mode="w:gz")
    archive(tmp_path / "cut.tar", {"1.png": CONTENT * 100})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:1000])
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("1.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    archive(tmp_path / "many.tar", {f"{number}.png": b"x" for number in range(4)})
    for name in ("packed", "cut"):
        said = refusal(sources.read, f"{name}.tar#1.png", str(tmp_path))
        assert "is not a complete tar archive" in said
    assert "is not in the archive" in refusal(sources.read, "links.tar#1.png", str(tmp_path))
    monkeypatch.setattr(archives, "MOST_MEMBERS", 3)
    assert "more than 3 files" in refusal(sources.read, "many.tar#1.png", str(tmp_path))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.png"))
    assert "has two files '1.png'" in refusal(sources.read, "twice.tar#1.png", str(tmp_path))
