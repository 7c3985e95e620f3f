"""`results.jsonl`: what GenEval's `summary_scores.py` reads (arXiv:2310.11513), a line an image."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from jaxdiff.evaluation.records import Prompt

RESULTS = "results.jsonl"


def lines(rows: pa.Table, prompts: list[Prompt], folder: Path) -> Iterator[str]:
    """Yields a JSON line for each image.

    Args:
      rows: of `merging.merge`, judged.
      folder: that holds GenEval's layout, as the user names it.
    """
    for row in rows.to_pylist():
        prompt = prompts[row["owner"]]
        image = folder / f"{row['owner']:05d}" / "samples" / f"{row['index']:04d}.png"
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
