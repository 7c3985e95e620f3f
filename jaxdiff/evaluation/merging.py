"""Merges the scores of a run's shards into one `Scores`, ordered by prompt."""

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
    settings: dict[str, str],
    with_clip: bool,
) -> tuple[Scores, pa.Table]:
    """Merges the tables of `scoring.score_file`, with one full table in memory at a time.

    Args:
      images: the number of images per prompt; a prompt's images may be in several tables.
      name, settings: the run's, for `Scores`.
      with_clip: whether the tables' features are CLIP embeddings.

    Returns:
      the scores; and a table with one row per image, in the same order, with `owner`, the number
      of its prompt, and `part`, the number of its table.

    Raises:
      InputError: for an image of an unknown prompt, or a prompt without exactly `images` images.
    """
    numbers = {prompt.id: number for number, prompt in enumerate(prompts)}
    of_prompts = _OfPrompts(images)
    kept = []
    for part, table in enumerate(tables):
        owners = [numbers.get(each, -1) for each in table["id"].to_pylist()]
        if -1 in owners:
            stranger = table["id"][owners.index(-1)].as_py()
            raise InputError(
                f"prompt {stranger!r} of the images is not in the benchmark's file; name the file "
                "that they were made from, or leave --prompts out with --benchmark prompts"
            )
        if with_clip:
            of_prompts.add(owners, table)
        table = table.select(KEPT).append_column("owner", pa.array(owners, pa.int32()))
        kept.append(table.append_column("part", pa.array([part] * len(table), pa.int32())))
    if not kept:
        raise InputError("there are no images to score; give a dataset or layout with images")
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
        settings=settings,
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
            f"prompt {prompt.id!r} has {count} images, but the benchmark needs {images} of each; "
            "set --images, or name images that were made for this benchmark"
        )


class _OfPrompts:
    """Measures over each prompt's images; frees their embeddings once all have been added."""

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
        """Yields each measure with its values by prompt, NaN for fewer than two images."""
        if not self._values:
            return
        for column, measure in enumerate(("diversity", "near_duplicates")):
            found = np.full(prompts, np.nan)
            for owner, values in self._values.items():
                found[owner] = values[column]
            yield measure, found
