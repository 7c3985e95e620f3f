"""--overwrite keeps the old run until the new one has a finished shard."""

import contextlib
import os
from pathlib import Path

import pytest

from jaxdiff.dataset import names
from jaxdiff.dataset.local import LocalStore


class Killed(BaseException):
    pass


@pytest.fixture
def old(tmp_path) -> Path:
    """A directory with all files of a run and an unrelated file."""
    for name in names.OURS:
        path = tmp_path / name
        if "." in name or name == names.SUCCESS:
            path.write_text("old")
        else:
            path.mkdir(parents=True)
            (path / "00000.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def contents(directory: Path) -> dict[str, str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(directory).as_posix(): path.read_text() for path in paths}


def overwrite(directory: Path, made: bool) -> None:
    with LocalStore(directory).held():
        LocalStore(directory).set_aside()
        for name in (names.PLAN, names.DONE, names.DATA):
            (directory / name).mkdir()
        (directory / names.PLAN / "plan.json").write_text("new")
        (directory / names.REJECTED).write_text("new")
        if made:
            (directory / names.DONE / "00000.json").write_text("new")


def test_a_run_without_a_shard_restores_the_old_one(old):
    before = contents(old)
    overwrite(old, made=False)
    assert contents(old) == before


def test_a_run_with_a_shard_replaces_the_old_one(old):
    overwrite(old, made=True)
    new = {name: text for name, text in contents(old).items() if text != "mine"}
    assert set(new.values()) == {"new"}
    assert (old / "notes.txt").exists()


@pytest.mark.parametrize("renames", range(2 * len(names.OURS)))
def test_a_kill_at_any_rename_loses_nothing(old, monkeypatch, renames):
    """Kills first while the old run is set aside, then while it is restored."""
    before, left = contents(old), renames

    def counted(function):
        def rename(*paths) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            function(*paths)

        return rename

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(Killed):
            overwrite(old, made=False)
    with LocalStore(old).held():
        assert contents(old) == before


def test_a_plan_without_shards_survives_a_kill_before_it_is_set_aside(old):
    (old / names.DONE / "00000.json").unlink()
    before = contents(old)
    (old / names.OLD).mkdir()  # the first step
    with LocalStore(old).held():
        assert contents(old) == before


@pytest.mark.parametrize("steps", range(12))
def test_deleting_a_run_removes_its_plan_atomically(old, monkeypatch, steps):
    left = steps

    def counted(function):
        def step(*args, **kwargs) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            function(*args, **kwargs)

        return step

    (old / names.PLAN / "plan.json").write_text("old")
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for name in ("unlink", "rename"):
            patch.setattr(os, name, counted(getattr(os, name)))
        LocalStore(old).clear()
    plan = old / names.PLAN
    assert not plan.exists() or len(list(plan.iterdir())) == 2
