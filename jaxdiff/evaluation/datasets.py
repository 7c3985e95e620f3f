"""The pictures of a dataset of `jaxdiff generate`, each with the prompt that it was to show."""

import json
from collections.abc import Iterator
from pathlib import Path

from jaxdiff.dataset import image_files
from jaxdiff.dataset import local as layout
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset.finished import reader
from jaxdiff.dataset.plan import Plan
from jaxdiff.errors import InputError
from jaxdiff.evaluation.benchmarks import prompt_of
from jaxdiff.evaluation.records import Picture


def open_dataset(directory: Path) -> Plan:
    """The plan of a finished dataset; raises InputError where there is none."""
    plan = plans.load(directory)
    if plan is None:
        raise InputError(f"{directory} holds no dataset of jaxdiff generate")
    if not (directory / layout.SUCCESS).exists():
        raise InputError(f"{directory} is not finished; run its generate command again")
    return plan


def of_shard(directory: Path, plan: Plan, shard: int) -> Iterator[Picture]:
    """Yields the pictures of a shard, those that could not be made without an image.

    Raises:
      InputError: at the first file or row that is not as it was made.
    """
    extension = image_files.EXTENSIONS[plan.settings.image_format]
    for row, image in reader.images_of(directory, plan, shard):
        prompt = prompt_of(json.loads(row["metadata"]), row["id"], row["prompt"])
        yield Picture(row["key"], prompt, row["image_index"], row["seed"], image, extension)


def of_dataset(directory: Path) -> Iterator[Picture]:
    """Yields the pictures of a finished dataset; raises InputError as the two above."""
    plan = open_dataset(directory)
    for shard in range(len(plan.shard_sizes)):
        yield from of_shard(directory, plan, shard)
