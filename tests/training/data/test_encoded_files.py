"""Encoded files are read back as they were written, and their contents are not trusted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.training.data import batches, encoded, open_examples
from jaxdiff.training.recipe import Data

CAPTIONS = ["eins", "zwei ☀", "drei", "vier", "fünf"]


def arrays(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "mean": random.standard_normal((count, 4, 2, 8)),
        "std": random.random((count, 4, 2, 8)),
        "embeddings": {
            "context": random.standard_normal((count, 7, 6)),
            "pooled": random.standard_normal((count, 3)),
        },
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images in two shards, with embeddings of two numbers each."""
    (tmp_path / "data").mkdir()
    (tmp_path / encoded.SETTINGS).write_text("{}")
    shards = []
    for number, captions in enumerate([CAPTIONS[:3], CAPTIONS[3:]]):
        name = f"data/{number:05d}.safetensors"
        content = encoded.shard_bytes(captions=captions, **arrays(len(captions), number))
        (tmp_path / name).write_bytes(content)
        shards.append(encoded.Shard(name, 32, 16, len(captions)))
    empty = {name: array[0] for name, array in arrays(1, 9)["embeddings"].items()}
    (tmp_path / encoded.EMPTY).write_bytes(encoded.empty_bytes(empty))
    made_with = {"autoencoder": "a", "text_encoders": "b"}
    (tmp_path / encoded.INDEX).write_text(encoded.index_text(shards, made_with))
    return tmp_path


def test_everything_is_read_back_as_it_was_written(folder):
    examples = open_examples(Data(path=str(folder)))
    assert len(examples) == 5
    assert examples.sizes.tolist() == [[32, 16]] * 5
    assert [examples.caption(index) for index in range(5)] == CAPTIONS
    assert examples.made_with == {"autoencoder": "a", "text_encoders": "b"}
    for index in range(5):
        stored = arrays(3 if index < 3 else 2, index // 3)
        row = index % 3
        half = np.stack([stored["mean"][row], stored["std"][row]]).astype(np.float16)
        np.testing.assert_array_equal(np.stack(examples.posterior(index)), half)
        for name, array in stored["embeddings"].items():
            found = examples.embedding(index)[name]
            np.testing.assert_array_equal(found, array[row].astype(np.float16))
    assert {name: array.shape for name, array in examples.empty.items()} == {
        "context": (7, 6),
        "pooled": (3,),
    }


def test_a_mask_is_read_back_as_truth_values(folder):
    mask = np.arange(7) < np.arange(1, 6)[:, None]
    for number, rows in enumerate((slice(3), slice(3, 5))):
        captions = CAPTIONS[rows]
        made = arrays(len(captions), number)
        made["embeddings"]["mask"] = mask[rows]
        content = encoded.shard_bytes(captions=captions, **made)
        (folder / f"data/{number:05d}.safetensors").write_bytes(content)
    empty = {name: array[0] for name, array in arrays(1, 9)["embeddings"].items()}
    empty["mask"] = mask[0]
    (folder / encoded.EMPTY).write_bytes(encoded.empty_bytes(empty))
    examples = open_examples(Data(path=str(folder)))
    found = np.stack([examples.embedding(index)["mask"] for index in range(5)])
    assert found.dtype == examples.empty["mask"].dtype == bool
    np.testing.assert_array_equal(found, mask)


def test_a_batch_has_embeddings_and_captions(folder):
    examples = open_examples(Data(path=str(folder)))
    batch = batches(examples, batch_size=3, seed=0, sizes=[(32, 16)])(0)
    shapes = {name: array.shape for name, array in batch.items() if name != "captions"}
    assert shapes == {"latents": (3, 4, 2, 8), "context": (3, 7, 6), "pooled": (3, 3)}
    for caption, context in zip(batch["captions"], batch["context"], strict=True):
        stored = examples.embedding(CAPTIONS.index(caption))["context"]
        np.testing.assert_array_equal(context, stored)


def change(folder: Path, **message) -> None:
    index = json.loads((folder / encoded.INDEX).read_text())
    index["shards"][0] |= message
    (folder / encoded.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / encoded.INDEX).unlink(), "not fully encoded"),
        (lambda f: (f / encoded.INDEX).write_text("{"), "encoded.json is invalid"),
        (lambda f: (f / encoded.INDEX).write_text('{"version": 2}'), "another version"),
        (lambda f: change(f, file="../../secret.safetensors"), "not a valid shard name"),
        (lambda f: change(f, file="/etc/passwd"), "not a valid shard name"),
        (lambda f: change(f, images=10**12), "does not match"),
        (lambda f: change(f, images="3"), "does not match"),
        (lambda f: change(f, height=-1), "does not match"),
        (lambda f: change(f, more=1), "encoded.json is invalid"),
        (lambda f: (f / "data/00001.safetensors").unlink(), "00001.safetensors is missing"),
        (lambda f: (f / "data/00001.safetensors").write_bytes(b"cut"), "00001.safetensors"),
        (lambda f: (f / encoded.EMPTY).unlink(), "empty.safetensors is missing"),
        (
            lambda f: (f / encoded.EMPTY).write_bytes(encoded.empty_bytes({"x": np.ones(2)})),
            "contains no embeddings",
        ),
        (
            lambda f: (f / "data/00000.safetensors").write_bytes(
                encoded.shard_bytes(captions=["a", "", "c"], **arrays(3))
            ),
            "does not match",
        ),
    ],
)
def test_damaged_files_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        open_examples(Data(path=str(folder)))
    assert "\n" not in str(caught.value)
