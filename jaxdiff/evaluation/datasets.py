"""Reads the pictures of a `jaxdiff generate` dataset, each with its prompt."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jaxdiff.dataset import names, run
from jaxdiff.dataset.finished import reader
from jaxdiff.dataset.run import Run
from jaxdiff.errors import InputError
from jaxdiff.evaluation.benchmarks import prompt_of
from jaxdiff.evaluation.records import Picture, Prompt
from jaxdiff.images import image_files


def open_dataset(where: str | Path) -> Run:
    """Opens a finished dataset; raises InputError if there is none."""
    found = run.find(where)
    if found is None:
        raise InputError(f"{where} is not a jaxdiff generate dataset; give one that is")
    if found.store.kind(names.SUCCESS):
        raise InputError(f"{where} is not finished; run its generate command again")
    return found


def prompts_of(dataset: Run) -> tuple[list[Prompt], int]:
    """Returns a dataset's prompts, and the largest number of images of one of them.

    Raises:
      InputError: if columns that `jaxdiff evaluate` wrote are damaged.
    """
    prompts, images = {}, Counter()
    for shard in dataset.shards:
        for image in dataset.planned(shard):
            images[image.id] += 1
            if images[image.id] == 1:
                metadata = json.loads(image.metadata)
                prompts[image.id] = prompt_of(metadata, image.id, image.request.prompt)
    return list(prompts.values()), max(images.values(), default=0)


def of_shard(dataset: Run, shard: int) -> Iterator[Picture]:
    """Yields the pictures of a shard; failed ones have no image.

    Raises:
      InputError: at the first file or row that has changed since it was written.
    """
    extension = image_files.EXTENSIONS[dataset.plan.settings.image_format]
    for row, image in reader.images_of(dataset, shard):
        prompt = prompt_of(json.loads(row["metadata"]), row["id"], row["prompt"])
        yield Picture(row["key"], prompt, row["image_index"], row["seed"], image, extension)


def of_dataset(where: str | Path) -> Iterator[Picture]:
    """Yields the pictures of a finished dataset; raises InputError as the functions above do."""
    dataset = open_dataset(where)
    for shard in dataset.shards:
        yield from of_shard(dataset, shard)
