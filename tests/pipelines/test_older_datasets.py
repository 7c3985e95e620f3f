"""This version verifies and continues datasets that an earlier version made or began.

The datasets in tests/golden/datasets were made at e85cb56 with two threads on a CPU:

    jaxdiff generate --manifest rows.jsonl --model model --output finished --steps 2 --batch-size 2
        --images-per-shard 4 --width 16 --height 16 --eta 0.3 --sampler ddim
    jaxdiff generate --manifest long.jsonl --model model --output unfinished --steps 60
        --images-per-shard 8 --width 32 --height 32 --format imagefolder    # SIGTERM after a shard
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxdiff import cli
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset.run import open_run
from jaxdiff.dataset.settings import Settings, written
from jaxdiff.request import LATER

GOLDEN = Path(__file__).parents[1] / "golden" / "datasets"
FINISHED = {"steps": 2, "batch-size": 2, "images-per-shard": 4, "width": 16, "height": 16}
FINISHED |= {"eta": 0.3, "sampler": "ddim"}
UNFINISHED = {"steps": 60, "images-per-shard": 8, "width": 32, "height": 32}
UNFINISHED |= {"format": "imagefolder"}


@pytest.fixture
def golden(tmp_path, monkeypatch) -> Path:
    """Returns a copy of the datasets, which are pinned to two threads."""
    monkeypatch.setenv("NPROC", "2")
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def generate(folder: Path, manifest: str, output: str, options: dict) -> int:
    said = {"manifest": folder / manifest, "model": folder / "model", "output": folder / output}
    return cli.main(
        ["generate", *(f"--{name}={value}" for name, value in (said | options).items())]
    )


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_a_finished_dataset_verifies_and_the_same_command_does_nothing(golden, capsys):
    before = contents(golden / "finished")
    assert cli.main(["verify", str(golden / "finished")]) == 0
    assert generate(golden, "rows.jsonl", "finished", FINISHED) == 0
    assert "is already finished: 6 images" in capsys.readouterr().out
    after = contents(golden / "finished")
    assert {name: after[name] for name in before} == before


def test_an_unfinished_dataset_is_continued_by_the_same_command(golden):
    before = contents(golden / "unfinished")
    assert generate(golden, "long.jsonl", "unfinished", UNFINISHED) == 0
    assert cli.main(["verify", str(golden / "unfinished")]) == 0
    after = contents(golden / "unfinished")
    assert {name: after[name] for name in before} == before
    assert open_run(golden / "unfinished").plan.images == 40


def test_a_finished_dataset_is_extended(golden):
    with (golden / "rows.jsonl").open("a") as manifest:
        manifest.write('{"prompt": "a cross"}\n')
    assert generate(golden, "rows.jsonl", "finished", FINISHED) == 0
    assert cli.main(["verify", str(golden / "finished")]) == 0
    assert open_run(golden / "finished").plan.images == 7


def test_an_option_missing_from_a_plan_has_its_default(golden):
    path = golden / "finished" / "_jaxdiff" / "plan" / "plan.json"
    said = json.loads(path.read_text())
    del said["identity"]["deep_cache"]  # as if the option had been added later
    path.write_text(json.dumps(said | {"id": plans.digest(said["identity"])}))
    assert open_run(golden / "finished").plan.settings.deep_cache == 1


def test_a_new_option_with_its_default_keeps_the_plans_id(golden):
    @dataclass(frozen=True, kw_only=True)
    class MoreSettings(Settings):
        vigour: float = field(default=1.0, metadata=LATER)

    settings = vars(open_run(golden / "finished").plan.settings)
    identity = open_run(golden / "finished").plan.identity
    assert written(Settings(**settings)).items() <= identity.items()
    assert written(MoreSettings(**settings)) == written(Settings(**settings))
    changed = written(MoreSettings(**settings, vigour=0.5))
    assert changed == written(Settings(**settings)) | {"vigour": 0.5}
