"""Best of N: of each prompt's images the one that a referee scores highest."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxdiff.evaluation.records import Picture, Prompt

IMAGES = "images"
METADATA = "metadata.jsonl"  # the Hub's imagefolder


def chosen(owners: np.ndarray, values: np.ndarray, prompts: int) -> np.ndarray:
    """The rows of the best images, int64, at most one a prompt; the first of equals.

    Args:
      owners: int32 [images], ascending: which prompt each is of.
      values: float64 [images]; NaN is never chosen.
    """
    order = np.lexsort((np.arange(len(values)), -values, owners))  # NaN comes last of its prompt
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
    """Writes the best images as an imagefolder, with the scores of all candidates beside each.

    Args:
      directory: made, or replaced when all is written.
      rows: of `merging.merge`.
      pictures: all of them, in any order.
      measure: that decides.
      measures: that are told.

    Returns:
      how many there are; a prompt none of whose images could be made has none.
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
