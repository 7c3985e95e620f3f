"""Fixtures for a small job on real Beam with a real model."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
from injected import injector

from jaxdiff import cli

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": "a red circle", "num_images": 3, "note": "ü"},
    {"prompt": "a blue square", "id": "square", "seed": 7, "negative_prompt": "a star"},
    {"prompt": "a star", "seeds": [5, 9], "guidance_scale": 3},
    {"prompt": "two rings", "num_images": 18},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
MANIFEST = "\n".join([*LINES[:2], "{broken", *LINES[2:]]) + "\n"


@pytest.fixture(scope="session")
def manifest_path(tmp_path_factory) -> Path:
    """Returns the manifest path of all jobs, because a plan contains the path."""
    return tmp_path_factory.mktemp("manifest") / "rows.jsonl"


@pytest.fixture
def manifest(manifest_path) -> Path:
    """Writes the manifest: rows for 24 images, and an invalid row."""
    manifest_path.write_text(MANIFEST, "utf-8")
    return manifest_path


@pytest.fixture
def command(manifest, tiny_checkpoint):
    """Returns the arguments of a job of six shards, two batches each: `command(directory, ...)`."""

    def command(output: Path, *more: str, manifest: Path = manifest) -> list[str]:
        return job(manifest, output, tiny_checkpoint, *more)

    return command


@pytest.fixture
def small_job(tmp_path, command):
    """Returns the arguments of a job for two prompts: `small_job(output, "--num-images=20", ...)`.

    Its default is ten shards.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")

    def small_job(output: Path | str, *more: str) -> list[str]:
        return command(output, "--num-images=20", *more, manifest=prompts)

    return small_job


def job(manifest: Path, output: Path, model: Path, *more: str) -> list[str]:
    said = {"manifest": manifest, "output": output, "model": model}
    said |= {"steps": 2, "batch-size": 2, "images-per-shard": 4}
    return ["generate", *(f"--{name}={value}" for name, value in said.items()), *more]


@pytest.fixture(scope="session")
def make_finished(manifest_path, tiny_checkpoint, tmp_path_factory):
    """Returns a function that makes a finished dataset; it leaves its manifest."""

    def make(*more: str, manifest: str = MANIFEST) -> Path:
        directory = tmp_path_factory.mktemp("finished") / "out"
        manifest_path.write_text(manifest, "utf-8")
        assert cli.main(job(manifest_path, directory, tiny_checkpoint, *more)) == 0
        return directory

    return make


@pytest.fixture(scope="session")
def finished(make_finished):
    """Returns finished datasets, each made once and not to be changed: `finished(...)`.

    It leaves its manifest at `manifest_path`.
    """

    @cache
    def finished(*more: str, **manifest: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            injector(patch)(None)  # the first test that wants it may be one of `noisy`
            return make_finished(*more, **manifest)

    return finished


@pytest.fixture(scope="session")
def noise(make_finished):
    """Returns finished datasets as the workers of `noisy` make them; otherwise as `finished`."""

    @cache
    def noise(*more: str, **manifest: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            injector(patch)("import noise")
            return make_finished(*more, **manifest)

    return noise


@pytest.fixture
def finish(finished):
    """Copies the finished dataset of `command(directory, ...)` into a directory."""

    def finish(directory: Path, *more: str, **manifest: str) -> None:
        shutil.copytree(finished(*more, **manifest), directory)

    return finish


@pytest.fixture
def generate(tmp_path, tiny_checkpoint):
    """Returns a function that runs a job of rows with the options; returns its exit code."""

    def generate(rows: list[dict], *more, output: str = "out", model=tiny_checkpoint) -> int:
        manifest = tmp_path / "rows.jsonl"
        manifest.write_text("".join(json.dumps({"prompt": "a ring", **row}) + "\n" for row in rows))
        said = {"manifest": manifest, "output": tmp_path / output, "model": model, "steps": 4}
        options = [f"--{name}={value}" for name, value in said.items()]
        return cli.main(["generate", *options, *(str(each) for each in more)])

    return generate


@pytest.fixture
def environment() -> dict[str, str]:
    """Returns the environment for jobs in processes of their own."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def faulty(monkeypatch):
    """Makes workers started from now on run some code first; None ends this."""
    return injector(monkeypatch)


@pytest.fixture
def noisy(faulty):
    """Makes workers use `faults/noise.py`, a model that loads at once; they may run code, too.

    For tests in which no network takes part: a worker starts in a quarter of the time.
    """

    def noisy(code: str = "") -> None:
        faulty(f"import noise\n{code}")

    noisy()
    return noisy


@pytest.fixture(scope="module")
def noise_throughout():
    """Makes the workers of all tests of a module use `faults/noise.py`, if no test says else."""
    with pytest.MonkeyPatch.context() as patch:
        injector(patch)("import noise")
        yield
