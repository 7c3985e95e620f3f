"""Best of N: keeps the image of each prompt that a measure scores highest."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxdiff.evaluation.records import Picture, Prompt

IMAGES = "images"
METADATA = "metadata.jsonl"  # as in the Hub's imagefolder format


def chosen(owners: np.ndarray, values: np.ndarray, prompts: int) -> np.ndarray:
    """Returns the rows of the best images, int64, at most one per prompt; the first on ties.

    Args:
      owners: int32 [images], ascending: the index of each image's prompt.
      values: float64 [images]; NaN is never chosen.
    """
    order = np.lexsort((np.arange(len(values)), -values, owners))  # NaN sorts last in its prompt
    order = order[np.isfinite(values[order])]
    _, firsts = np.unique(owners[order], return_index=True)
    return order[firsts]


def write(
    directory: Path,
    rows: pa.Table,
    prompts: list[Prompt],
    pictures: Iterable[Picture],
    measure: str,
    measures: list[str],
) -> int:
    """Writes the best images as an imagefolder, each with the scores of all its candidates.

    Args:
      directory: created, or replaced once everything is written.
      rows: the table from `merging.merge`.
      pictures: all pictures, in any order.
      measure: the measure that chooses the best image.
      measures: the measures to write for the candidates.

    Returns:
      the number of images; a prompt has none if all of its images failed.
    """
    owners = rows["owner"].to_numpy()
    values = rows[measure].to_numpy(zero_copy_only=False).astype(np.float64)
    best = chosen(owners, values, len(prompts))
    wanted = {rows["key"][int(row)].as_py(): int(row) for row in best}
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / IMAGES).mkdir(parents=True)
    try:
        lines = {}
        for picture in pictures:
            row = wanted.get(picture.key)
            if row is None:
                continue
            name = f"{IMAGES}/{row:09d}.{picture.extension}"
            (unfinished / name).write_bytes(picture.image)
            first, last = np.searchsorted(owners, (owners[row], owners[row] + 1))
            candidates = rows.slice(first, last - first)
            lines[row] = {
                "file_name": name,
                "prompt": picture.prompt.text,
                "id": picture.prompt.id,
                "category": picture.prompt.category,
                "index": picture.index,
                "seed": picture.seed,
                "kept_by": measure,
                "scores": candidates.select(["index", "seed", *measures]).to_pylist(),
            }
        with (unfinished / METADATA).open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(lines[row], ensure_ascii=False) + "\n" for row in sorted(lines)
            )
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(lines)
