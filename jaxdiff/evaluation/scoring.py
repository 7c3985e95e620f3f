"""Scores pictures and keeps the results, one Parquet file per shard."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.errors import InputError
from jaxdiff.evaluation import clip_measures, duplicates, statistics
from jaxdiff.evaluation.records import Picture
from jaxdiff.images import image_files
from jaxdiff.worlds.shapes import caption_for, read
from jaxdiff.worlds.shapes.scene import CANVAS
from jaxdiff.worlds.shapes.verdict import compare

VERSION = 1  # of the columns and their meaning
AT_ONCE = 64  # pictures in memory
OF_STATISTICS = ("brightness", "contrast", "colorfulness", "sharpness")
COLUMNS = {
    "key": pa.string(),
    "id": pa.string(),
    "index": pa.int32(),
    "seed": pa.int64(),
    "made": pa.bool_(),
    "correct": pa.float64(),
    "clip_score": pa.float64(),
    "label": pa.float64(),
    **dict.fromkeys(OF_STATISTICS, pa.float64()),
    "height": pa.int32(),
    "width": pa.int32(),
    "reason": pa.string(),
    "details": pa.string(),
    "said": pa.string(),  # the most likely label according to CLIP
    "pixel_sha256": pa.string(),
    "perceptual_hash": pa.uint64(),
    "features": pa.list_(pa.float32()),  # the CLIP embedding, or the thumbnail features
}
EMPTY = {"reason": "not made", "details": "{}", "said": "", "pixel_sha256": ""}


@dataclass(frozen=True)
class Scoring:
    """What to measure on every picture.

    Attributes:
      exact: whether the shapes world's scorer judges it.
      clip: the directory or Hub id of CLIP's weights; "" for none.
      clip_fingerprint: of these weights, since a directory's content may change.
      labels: the labels that CLIP chooses from; empty for no zero-shot label.
    """

    exact: bool
    clip: str = ""
    clip_fingerprint: str = ""
    labels: tuple[str, ...] = ()

    def digest(self, of_pictures: str) -> str:
        """Returns the SHA-256 (hex) of everything that determines the scores of these pictures."""
        said = [VERSION, of_pictures, self.exact, self.clip_fingerprint, self.labels]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def score_file(pictures: Iterable[Picture], scoring: Scoring, path: Path, digest: str) -> pa.Table:
    """Scores pictures and writes a file for `read_file` atomically; returns its table.

    Raises:
      InputError: for a picture that cannot be read or judged.
    """
    rows = [row for block in _blocks(pictures) for row in _scored(block, scoring)]
    schema = pa.schema(COLUMNS, {"digest": digest})
    table = pa.Table.from_pylist(rows, schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return table


def read_file(path: Path, digest: str) -> pa.Table | None:
    """Returns the scores in a file; None if it is missing, damaged, or of other pictures."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None
    said = (table.schema.metadata or {}).get(b"digest", b"").decode()
    return table if said == digest else None


def features(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Returns the keys of the pictures that were generated, and their features, float32 [n, d]."""
    table = table.filter(table["made"])
    values = table["features"].combine_chunks()
    width = len(values[0]) if len(table) else 0
    return table["key"].to_pylist(), values.flatten().to_numpy().reshape(len(table), width)


def _blocks(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    pictures = iter(pictures)
    while block := list(islice(pictures, AT_ONCE)):
        yield block


def _scored(block: list[Picture], scoring: Scoring) -> Iterator[dict]:
    pixels = [_decoded(picture) for picture in block]
    embedded = _embedded(block, pixels, scoring) if scoring.clip else [{}] * len(block)
    for picture, image, of_clip in zip(block, pixels, embedded, strict=True):
        row = {
            "key": picture.key,
            "id": picture.prompt.id,
            "index": picture.index,
            "seed": picture.seed,
            "made": image is not None,
        }
        if image is None:
            yield row | EMPTY | ({"correct": 0.0} if scoring.exact else {})
            continue
        if scoring.exact:
            row |= _judged(picture, image)
        yield {
            **EMPTY,
            "reason": "",
            **row,
            "height": image.shape[0],
            "width": image.shape[1],
            **statistics.image_statistics(image),
            "pixel_sha256": image_files.pixel_sha256(image),
            "perceptual_hash": duplicates.perceptual_hash(image),
            "features": statistics.thumbnail_features(image),
            **of_clip,
        }


def _decoded(picture: Picture) -> np.ndarray | None:
    if picture.image is None:
        return None
    try:
        return image_files.decode(picture.image)[..., :3]  # without alpha
    except ValueError as problem:
        raise InputError(f"image {picture.key}: {problem}") from None


def _judged(picture: Picture, image: np.ndarray) -> dict:
    if image.shape != (CANVAS, CANVAS, 3):
        height, width, _ = image.shape
        raise InputError(
            f"image {picture.key} has {width}x{height} pixels, but the shapes world's scorer needs "
            f"{CANVAS}x{CANVAS}; set --width {CANVAS} --height {CANVAS}, or use another benchmark"
        )
    if "include" not in picture.prompt.row:
        raise InputError(
            f"image {picture.key} has the prompt {checks.shown(picture.prompt.text)}, which is not "
            "a row of the shapes benchmark, so it cannot be judged; use --benchmark prompts"
        )
    seen = read(image)
    verdict = compare(caption_for({"prompt": picture.prompt.text, **picture.prompt.row}), seen)
    return {
        "correct": float(verdict.correct),
        "reason": verdict.reason,
        "details": json.dumps(dataclasses.asdict(seen)),
    }


def _embedded(block: list[Picture], pixels: list, scoring: Scoring) -> Iterator[dict]:
    """Yields the CLIP measures of each picture; an empty dict if it could not be generated."""
    tower = clip_measures.open_clip(scoring.clip)
    made = [image for image in pixels if image is not None]
    embeddings = iter(tower.embed_images(made))
    texts = tower.embed_texts([picture.prompt.text for picture in block])
    labels = tower.embed_labels(scoring.labels) if scoring.labels else None
    for picture, image, text in zip(block, pixels, texts, strict=True):
        if image is None:
            yield {}
            continue
        features = next(embeddings)
        found = {"features": features, "clip_score": clip_measures.clip_score(features, text)}
        if labels is not None:
            likely = clip_measures.zero_shot(features[None], labels, tower.logit_scale)
            said = scoring.labels[int(np.argmax(likely))]
            found |= {"said": said}
            if "label" in picture.prompt.row:
                found |= {"label": float(said == picture.prompt.row["label"])}
        yield found
