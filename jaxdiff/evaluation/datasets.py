"""Reads the pictures of a `jaxdiff generate` dataset, each with its prompt."""

import json
from collections.abc import Iterator
from pathlib import Path

from jaxdiff.dataset import image_files, names, run
from jaxdiff.dataset.finished import reader
from jaxdiff.dataset.run import Run
from jaxdiff.errors import InputError
from jaxdiff.evaluation.benchmarks import prompt_of
from jaxdiff.evaluation.records import Picture


def open_dataset(directory: Path) -> Run:
    """Opens a finished dataset; raises InputError if there is none."""
    found = run.find(directory)
    if found is None:
        raise InputError(f"{directory} is not a jaxdiff generate dataset; give one that is")
    if not found.store.path(names.SUCCESS).exists():
        raise InputError(f"{directory} is not finished; run its generate command again")
    return found


def of_shard(dataset: Run, shard: int) -> Iterator[Picture]:
    """Yields the pictures of a shard; failed ones have no image.

    Raises:
      InputError: at the first file or row that has changed since it was written.
    """
    extension = image_files.EXTENSIONS[dataset.plan.settings.image_format]
    for row, image in reader.images_of(dataset, shard):
        prompt = prompt_of(json.loads(row["metadata"]), row["id"], row["prompt"])
        yield Picture(row["key"], prompt, row["image_index"], row["seed"], image, extension)


def of_dataset(directory: Path) -> Iterator[Picture]:
    """Yields the pictures of a finished dataset; raises InputError as the functions above do."""
    dataset = open_dataset(directory)
    for shard in dataset.shards:
        yield from of_shard(dataset, shard)
