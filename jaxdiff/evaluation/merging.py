"""The scores of a run's shards put together: `Scores`, prompt by prompt."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from jaxdiff.errors import InputError
from jaxdiff.evaluation import clip_measures
from jaxdiff.evaluation.measures import OF_IMAGES
from jaxdiff.evaluation.records import Prompt, Scores

KEPT = ["key", "index", "seed", "reason", "details", "said", *OF_IMAGES]


def merge(
    tables: Iterable[pa.Table],
    prompts: list[Prompt],
    images: int,
    *,
    name: str,
    told: dict[str, str],
    with_clip: bool,
) -> tuple[Scores, pa.Table]:
    """Puts the tables of `scoring.score_file` together, holding one and what is kept of each.

    Args:
      images: how many there are of each prompt; a prompt may stand in several tables.
      with_clip: whether the tables' features are CLIP's.

    Returns:
      the scores; and a row an image, in the same order, with `owner`, its prompt's number, and
      `part`, its table's.

    Raises:
      InputError: for an image of no prompt, and for a prompt that has not `images`.
    """
    numbers = {prompt.id: number for number, prompt in enumerate(prompts)}
    of_prompts = _OfPrompts(images)
    kept = []
    for part, table in enumerate(tables):
        owners = [numbers.get(each, -1) for each in table["id"].to_pylist()]
        if -1 in owners:
            stranger = table["id"][owners.index(-1)].as_py()
            raise InputError(
                f"the images hold a prompt {stranger!r} that the benchmark's file does not; "
                "name the file that they were made from, or another --output"
            )
        if with_clip:
            of_prompts.add(owners, table)
        table = table.select(KEPT).append_column("owner", pa.array(owners, pa.int32()))
        kept.append(table.append_column("part", pa.array([part] * len(table), pa.int32())))
    if not kept:
        raise InputError("there is no image to be judged")
    rows = pa.concat_tables(kept).sort_by([("owner", "ascending"), ("index", "ascending")])
    _check_whole(rows, prompts, images)
    values = {
        measure: rows[measure].to_numpy(zero_copy_only=False).astype(np.float64)
        for measure in OF_IMAGES
        if rows[measure].null_count < len(rows)
    }
    owners = rows["owner"].to_numpy()
    if with_clip:
        values |= {measure: found[owners] for measure, found in of_prompts.values(len(prompts))}
    scores = Scores(
        name=name,
        told=told,
        prompts=prompts,
        keys=rows["key"].to_pylist(),
        seeds=rows["seed"].to_numpy(),
        owners=owners,
        values=values,
        reasons=rows["reason"].to_pylist(),
    )
    return scores, rows


def _check_whole(rows: pa.Table, prompts: list[Prompt], images: int) -> None:
    counts = np.bincount(rows["owner"].to_numpy(), minlength=len(prompts))
    if (wrong := np.flatnonzero(counts != images)).size:
        prompt, count = prompts[wrong[0]], counts[wrong[0]]
        raise InputError(
            f"prompt {prompt.id!r} has {count} images, and the benchmark {images} of each: "
            "say --images, or name images that were made for this benchmark"
        )


class _OfPrompts:
    """What is measured among a prompt's images; embeddings are let go when they are all there."""

    def __init__(self, images: int):
        self._images = images
        self._waiting: dict[int, list] = defaultdict(list)
        self._values: dict[int, tuple[float, float]] = {}

    def add(self, owners: list[int], table: pa.Table) -> None:
        for owner, features in zip(owners, table["features"], strict=True):
            self._waiting[owner].append(features.as_py())
            if len(self._waiting[owner]) == self._images:
                made = [each for each in self._waiting.pop(owner) if each is not None]
                if len(made) > 1:
                    made = np.array(made, np.float32)
                    self._values[owner] = (
                        clip_measures.diversity(made),
                        clip_measures.near_duplicates(made),
                    )

    def values(self, prompts: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each measure with its values by prompt, NaN where there are not two images."""
        if not self._values:
            return
        for column, measure in enumerate(("diversity", "near_duplicates")):
            found = np.full(prompts, np.nan)
            for owner, values in self._values.items():
                found[owner] = values[column]
            yield measure, found
