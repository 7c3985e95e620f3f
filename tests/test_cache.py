"""Answers are kept in the cache directory, and taken only from there if nobody changed them."""

import os

import pytest

from jaxdiff import cache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxdiff"


def ask(identity: str) -> tuple[bytes, bool]:
    """Returns an answer, and whether it had to be found."""
    asked = []

    def make() -> bytes:
        asked.append(identity)
        return f"answer to {identity}".encode()

    return cache.remembered("answers", identity, make), bool(asked)


def test_an_answer_is_found_once():
    assert [ask(name) for name in "aab"] == [
        (b"answer to a", True),
        (b"answer to a", False),
        (b"answer to b", True),
    ]


def test_an_answer_of_other_code_is_not_used(monkeypatch):
    ask("a")
    monkeypatch.setattr(cache, "code", lambda: "changed")
    assert ask("a") == (b"answer to a", True)


def test_a_damaged_answer_is_found_again(home):
    ask("a")
    (file,) = (home / "answers").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert ask("a") == (b"answer to a", True)
    assert ask("a") == (b"answer to a", False)


def test_nothing_is_taken_from_a_folder_that_others_can_write_to(home):
    ask("a")
    (home / "answers").chmod(0o777)
    assert [ask("a")[1] for _ in range(2)] == [True, True]


def test_without_a_cache_directory_answers_are_found_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [ask("a")[1] for _ in range(2)] == [True, True]


def test_failures_are_not_kept():
    def fail() -> bytes:
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        cache.remembered("answers", "a", fail)
    assert ask("a") == (b"answer to a", True)


def test_the_oldest_files_are_deleted(tmp_path):
    for age, name in enumerate(("new", "older", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    cache.forget_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "older"]
