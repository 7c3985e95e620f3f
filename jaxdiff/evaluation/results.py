"""`results.jsonl`: input of GenEval's `summary_scores.py` (arXiv:2310.11513), a line per image."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from jaxdiff.dataset.store import join
from jaxdiff.evaluation.records import Prompt

RESULTS = "results.jsonl"


def lines(rows: pa.Table, prompts: list[Prompt], where: str | Path) -> Iterator[str]:
    """Yields a JSON line for each image.

    Args:
      rows: the table from `merging.merge`, with judged images.
      where: the folder with GenEval's layout, as the user named it, or its address.
    """
    for row in rows.to_pylist():
        prompt = prompts[row["owner"]]
        image = join(where, f"{row['owner']:05d}/samples/{row['index']:04d}.png")
        yield json.dumps(
            {
                "filename": str(image),
                "tag": prompt.category,
                "prompt": prompt.text,
                "correct": bool(row["correct"]),
                "reason": row["reason"],
                "metadata": json.dumps(prompt.row),
                "details": row["details"],
            }
        )
