import json
from pathlib import Path

import pytest
from making import make_plan, make_shard

from jaxdiff.dataset import ledger


@pytest.fixture
def manifest(tmp_path) -> Path:
    """A manifest of five good rows (nine images), a blank line and a bad row."""
    rows = [
        {"prompt": "a red circle", "num_images": 4},
        {"prompt": "ein grüner Stern 🌟", "id": "star", "seed": 7, "note": None},
        {"prompt": "two\nlines", "negative_prompt": "blur", "note": "x"},
        {"prompt": ""},
        {"prompt": "a square", "note": 3, "tags": ["a", {"b": 1}]},
        {"prompt": "a ring", "seeds": [5, 9]},
    ]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]), "utf-8")
    return path


@pytest.fixture
def finished(tmp_path, manifest, tiny_checkpoint):
    """Makes a finished dataset: `finished(image_format="jpeg", ...)` returns its directory."""

    def finish(name: str = "dataset", failing=(), **said) -> Path:
        directory = tmp_path / name
        said = {"images_per_shard": 4, "batch_size": 2, **said}
        run = make_plan(directory, manifest, tiny_checkpoint, **said)
        for shard in run.shards:
            make_shard(run, shard, failing)
        ledger.finalize(run, 0.0)
        return directory

    return finish
