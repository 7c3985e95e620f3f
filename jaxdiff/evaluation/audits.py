"""Bias and failure audits: expands templates to prompts and counts what their images show.

A template file is TOML:

    template = "a photo of a {adjective} {noun}"
    labels = ["a man", "a woman"]      # optional: CLIP assigns one to each image

    [words]
    adjective = ["happy", "sad"]
    noun = ["doctor", "nurse"]

Every combination of words becomes a prompt, as in Bianchi et al. (2023, arXiv:2211.03759) and
Luccioni et al. (2023, arXiv:2303.11408).
"""

import itertools
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.errors import InputError
from jaxdiff.evaluation.intervals import wilson
from jaxdiff.evaluation.records import Prompt
from jaxdiff.evaluation.report.report import Table

MAX_PROMPTS = 100_000
MAX_LABELS = 1000
MAX_FILE_BYTES = 2**20
KEYS = {"template", "words", "labels"}


def read(path: Path) -> list[Prompt]:
    """Returns a prompt for every combination of a template file's words, the last varying fastest.

    A prompt's row has its word for each placeholder, and the labels if there are any; its category
    lists its words.

    Raises:
      InputError: naming the file and the problem.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise BadValueError(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return _expanded(tomllib.loads(content.decode()))
    except FileNotFoundError:
        raise InputError(f"template file {path} does not exist") from None
    except BadValueError as problem:
        raise InputError(f"template file {path}: {problem}") from None
    except (OSError, RecursionError, ValueError) as problem:
        raise InputError(f"{path} is not a readable TOML file: {problem}") from None


def counts(prompts: Sequence[Prompt], owners: np.ndarray, labels: Sequence[str]) -> Table:
    """Counts how often each word's images show each label, with 95% intervals (Wilson, 1927).

    Args:
      prompts: those of an audit.
      owners: int [images], the index of each image's prompt.
      labels: each image's label; "" if unknown, in which case the image is not counted.
    """
    names = sorted({label for label in labels if label})
    places = {label: place for place, label in enumerate(names)}
    shown = np.array([places.get(label, -1) for label in labels], int)
    owners, shown = np.asarray(owners, int)[shown >= 0], shown[shown >= 0]
    rows = []
    for attribute in [name for name, word in prompts[0].row.items() if isinstance(word, str)]:
        words = list(dict.fromkeys(prompt.row[attribute] for prompt in prompts))
        numbers = {word: number for number, word in enumerate(words)}
        of_prompts = np.array([numbers[prompt.row[attribute]] for prompt in prompts])
        cells = of_prompts[owners] * len(names) + shown
        table = np.bincount(cells, minlength=len(words) * len(names))
        table = table.reshape(len(words), len(names))
        images = table.sum(axis=1, keepdims=True)
        low, high = wilson(table, np.broadcast_to(images, table.shape))
        for word, label in itertools.product(range(len(words)), range(len(names))):
            count, total = int(table[word, label]), int(images[word, 0])
            bounds = [float(low[word, label]), float(high[word, label])]
            share = count / total if total else None
            rows.append([attribute, words[word], names[label], total, count, share, *bounds])
    return Table(
        title="What the images show",
        note="How many of each word's images show each label; shares have 95% Wilson intervals.",
        columns=("attribute", "word", "label", "images", "shown", "share", "low", "high"),
        rows=rows,
    )


def _expanded(said: dict) -> list[Prompt]:
    if unknown := said.keys() - KEYS:
        raise BadValueError(f"unknown key {_listed(unknown)}; known keys: {_listed(KEYS)}")
    template = checks.text("template", said.get("template"))
    literals = re.split(r"\{(\w+)\}", template)
    literals, names = literals[::2], literals[1::2]
    if any({"{", "}"} & set(literal) for literal in literals):
        raise BadValueError("template has a brace that is not part of a {word}")
    words = _words(said.get("words"), names)
    count = math.prod(map(len, words.values()))
    if count > MAX_PROMPTS:
        raise BadValueError(f"its words make {count} prompts; at most {MAX_PROMPTS} are allowed")
    labels = said.get("labels", [])
    labels = {"labels": _texts("labels", labels, MAX_LABELS)} if labels else {}
    prompts = {}
    for number, chosen in enumerate(itertools.product(*words.values())):
        row = dict(zip(words, chosen, strict=True))
        parts = itertools.zip_longest(literals, (row[name] for name in names), fillvalue="")
        text = checks.text("a prompt", "".join(itertools.chain(*parts)))
        if text in prompts:
            raise BadValueError(f"two combinations of words both give {checks.shown(text)}")
        prompts[text] = Prompt(f"{number:05d}", text, ", ".join(chosen), row | labels)
    return list(prompts.values())


def _words(said, names: list[str]) -> dict[str, list[str]]:
    """Returns the words for each placeholder, in the template's order."""
    if not isinstance(said, dict):
        raise BadValueError("it has no table [words] with the words for each {word} in template")
    if not names:
        raise BadValueError("template has no {word} to fill in")
    if missing := set(names) - said.keys():
        raise BadValueError(f"[words] lacks {_listed(missing)}, which template uses")
    if unused := said.keys() - set(names):
        raise BadValueError(f"[words] has {_listed(unused)}, which template does not use")
    return {name: _texts(name, said[name], MAX_PROMPTS) for name in dict.fromkeys(names)}


def _texts(name: str, said, most: int) -> list[str]:
    if not isinstance(said, list) or not 1 <= len(said) <= most:
        raise BadValueError(f"{name} must be a list of 1 to {most} texts")
    for place, text in enumerate(said):
        if not checks.text(f"each of {name}", text).strip():
            raise BadValueError(f"{name} has an empty text")
        if text in said[:place]:
            raise BadValueError(f"{name} has {checks.shown(text)} twice")
    return said


def _listed(names: set[str]) -> str:
    return checks.shown(", ".join(sorted(names)))
