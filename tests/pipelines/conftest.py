"""A small job on real Beam with a real model, for tests to run as they like."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": "a red circle", "num_images": 3, "note": "ü"},
    {"prompt": "a blue square", "id": "square", "seed": 7, "negative_prompt": "a star"},
    {"prompt": "a star", "seeds": [5, 9], "guidance_scale": 3},
    {"prompt": "two rings", "num_images": 18},
]


@pytest.fixture
def manifest(tmp_path) -> Path:
    """24 images, and a row that cannot be used."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n", "utf-8")
    return path


@pytest.fixture
def command(manifest, tiny_checkpoint):
    """The arguments of a job of six shards, two batches each: `command(directory, ...)`."""

    def command(output: Path, *more: str, manifest: Path = manifest) -> list[str]:
        said = {"manifest": manifest, "output": output, "model": tiny_checkpoint}
        said |= {"steps": 2, "batch-size": 2, "images-per-shard": 4}
        return ["generate", *(f"--{name}={value}" for name, value in said.items()), *more]

    return command


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For jobs in processes of their own."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def faulty(monkeypatch):
    """Lets the workers that are started from now on run some code first; None for no more."""
    paths = [str(Path(__file__).parent / "faults"), str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def faulty(code: str | None) -> None:
        monkeypatch.setenv("FAULT", code or "")

    return faulty
