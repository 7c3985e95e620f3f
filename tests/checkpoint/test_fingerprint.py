import hashlib
import os
import time

import pytest

from jaxdiff.checkpoint.fingerprint import REMEMBERED_BYTES, file_sha256, fingerprint

OLD = time.time_ns() - 10**12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxdiff" / "sha256"


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that is large and old enough for its hash to be cached."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(b"a" * REMEMBERED_BYTES)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    return path


def test_the_fingerprint_hashes_contents_and_names(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    lines = [f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in (("a/x", b"2"), ("b", b"1"))]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert fingerprint({"b": tmp_path / "one", "a/x": tmp_path / "two"}) == expected


def test_a_large_files_hash_is_cached(large, cache):
    expected = hashlib.sha256(large.read_bytes()).hexdigest()
    assert file_sha256(large) == expected
    (memory,) = cache.iterdir()
    assert file_sha256(large) == expected
    other = b"0" * 64
    memory.write_bytes(hashlib.sha256(other).digest() + other)
    assert file_sha256(large) == "0" * 64  # from the cache
    memory.write_bytes(other)
    assert file_sha256(large) == expected  # for it is damaged


def test_a_changed_file_is_hashed_again_even_with_its_old_size_and_time(large):
    os.utime(large, ns=(OLD, OLD))
    first = file_sha256(large)
    with large.open("r+b") as file:
        file.write(b"b")
    os.utime(large, ns=(OLD, OLD))
    assert file_sha256(large) != first
    other = large.with_name("other")
    other.write_bytes(b"c" * REMEMBERED_BYTES)
    os.utime(other, ns=(OLD, OLD))
    other.replace(large)
    assert file_sha256(large) == hashlib.sha256(large.read_bytes()).hexdigest()


def test_recently_changed_and_small_files_are_not_cached(tmp_path, cache):
    for size in (10, REMEMBERED_BYTES):
        (tmp_path / "file").write_bytes(b"a" * size)
        file_sha256(tmp_path / "file")
    assert not any(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_ignored(large, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_sha256(large) == hashlib.sha256(large.read_bytes()).hexdigest()
