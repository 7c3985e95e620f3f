"""Checkpoints from fsspec's file systems: in memory, and one with little metadata."""

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A separate cache directory for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxdiff" / "models"


def refusal(model: str, variant: str | None = None) -> str:
    """Returns the one-line error of opening a model."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(model, variant)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def bucket(tiny_checkpoint):
    """The tiny checkpoint in fsspec's memory, with other files that must not be fetched."""
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_checkpoint), "/bucket/models/tiny", recursive=True)
    memory.pipe("/bucket/models/tiny/unet/diffusion_pytorch_model.bin", b"pickle")
    memory.pipe("/bucket/models/tiny/safety_checker/model.safetensors", b"not needed")
    memory.pipe("/bucket/models/tiny/README.md", b"A card")
    yield memory
    memory.rm("/bucket", recursive=True)


def fetched(cache: Path) -> dict[str, int]:
    """Returns when each file in the cache was written."""
    return {path.name: path.stat().st_mtime_ns for path in (cache / "files").iterdir()}


def test_a_url_is_copied_into_the_cache_and_opened(bucket, tiny_checkpoint, cache):
    opened = open_checkpoint("memory://bucket/models/tiny/")
    assert opened.name == "tiny"
    assert opened.path.parent == cache
    assert opened.fingerprint == open_checkpoint(tiny_checkpoint).fingerprint
    needed = {path.relative_to(tiny_checkpoint) for path in tiny_checkpoint.rglob("*.*")}
    assert {path.relative_to(opened.path) for path in opened.path.rglob("*.*")} == needed


def test_only_changed_files_are_fetched_again(bucket, cache):
    first = open_checkpoint("memory://bucket/models/tiny")
    before = fetched(cache)
    assert open_checkpoint("memory://bucket/models/tiny").path == first.path
    assert fetched(cache) == before

    config = json.loads(bucket.cat("/bucket/models/tiny/unet/config.json")) | {"sample_size": 16}
    bucket.pipe("/bucket/models/tiny/unet/config.json", json.dumps(config).encode())
    second = open_checkpoint("memory://bucket/models/tiny")
    assert second.defaults.size == (128, 128)
    assert first.defaults.size == (64, 64)  # an open checkpoint keeps its files
    after = fetched(cache)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


class Terse(MemoryFileSystem):
    """A file system that, like plain HTTP servers, gives only files' names, and `stamps`."""

    stamps: ClassVar[dict[str, str]] = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("terse://"))

    def ls(self, path, detail=True, **_):
        entries = super().ls(path)
        return [{"name": e["name"], "type": e["type"], "size": None} | self.stamps for e in entries]

    def info(self, path, **_):
        return {"name": path, "type": "file", "size": None} | self.stamps


fsspec.register_implementation("terse", Terse)


def change_weights(bucket) -> None:
    path = f"/bucket/models/tiny/{UNET}"
    content = bucket.cat(path)
    bucket.pipe(path, content[:-1] + bytes([content[-1] ^ 1]))


def test_files_without_metadata_are_fetched_again(bucket, cache):
    first = open_checkpoint("terse://bucket/models/tiny")
    before = fetched(cache)
    assert open_checkpoint("terse://bucket/models/tiny").path == first.path
    assert fetched(cache).keys() == before.keys()  # equal contents are stored once
    change_weights(bucket)
    assert open_checkpoint("terse://bucket/models/tiny").fingerprint != first.fingerprint


@pytest.mark.parametrize("key", ["blob_id", "sha", "checksum", "ETag", "mtime"])
def test_a_file_systems_metadata_distinguish_versions(bucket, monkeypatch, key):
    monkeypatch.setattr(Terse, "stamps", {key: "1"})
    first = open_checkpoint("terse://bucket/models/tiny").fingerprint
    change_weights(bucket)
    assert open_checkpoint("terse://bucket/models/tiny").fingerprint == first
    monkeypatch.setattr(Terse, "stamps", {key: "2"})
    assert open_checkpoint("terse://bucket/models/tiny").fingerprint != first


def test_an_interrupted_copy_is_completed(bucket, cache):
    path = open_checkpoint("memory://bucket/models/tiny").path / UNET
    size = path.stat().st_size
    path.resolve().unlink()
    assert (open_checkpoint("memory://bucket/models/tiny").path / UNET).stat().st_size == size
    assert not list(cache.glob("**/.fetching*"))


def test_a_variant_is_fetched_alone(bucket):
    full = f"/bucket/models/tiny/{UNET}"
    bucket.mv(full, full.replace(".safetensors", ".fp16.safetensors"))
    opened = open_checkpoint("memory://bucket/models/tiny", "fp16")
    assert "diffusion_pytorch_model.fp16.safetensors" in os.listdir(opened.path / "unet")


def test_a_single_file_is_fetched_with_the_tokenizers_next_to_it(bucket, cache):
    bucket.pipe("/bucket/models/merged.safetensors", b"no weights")
    bucket.pipe("/bucket/models/merged.yaml", b"model: {}")
    bucket.copy("/bucket/models/tiny/tokenizer", "/bucket/models/tokenizer", recursive=True)
    error = refusal("memory://bucket/models/merged.safetensors")
    assert "merged.safetensors is not a safetensors file" in error
    (file,) = cache.glob("*/merged.safetensors")
    assert file.read_bytes() == b"no weights"
    assert (file.parent / "tokenizer" / "vocab.json").is_file()
    assert file.with_suffix(".yaml").read_bytes() == b"model: {}"


URL_FAULTS = {
    "memory://bucket/models": "contains no model_index.json",
    "memory://bucket/nothing": "contains no model_index.json",
    "memory://bucket/nothing.safetensors": "does not exist",
    "s3://bucket/model": "pip install s3fs",
    "gs://bucket/model": "pip install gcsfs",
    "abc://bucket/model": "abc",
}


@pytest.mark.parametrize(("url", "message"), URL_FAULTS.items(), ids=URL_FAULTS)
def test_a_url_without_a_checkpoint_gives_a_one_line_error(bucket, url, message, monkeypatch):
    for module in ("s3fs", "gcsfs"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, module, None)
    error = refusal(url)
    assert repr(url) in error
    assert message in error


def test_a_listing_cannot_write_outside_the_cache(bucket, tmp_path, cache):
    for name in ("..", "../../evil.safetensors", "diffusion_pytorch_model-1-of-2.safetensors/../x"):
        bucket.store[f"/bucket/models/tiny/unet/{name}"] = bucket.store[
            f"/bucket/models/tiny/{UNET}"
        ]
    opened = open_checkpoint("memory://bucket/models/tiny")
    inside = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(cache in path.parents for path in inside)
    assert sorted(os.listdir(opened.path / "unet")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
