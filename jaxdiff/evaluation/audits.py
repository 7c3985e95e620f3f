"""Bias and failure audits: templates that expand to prompts, and counts of what their images show.

A template file is TOML:

    template = "a photo of a {adjective} {noun}"
    labels = ["a man", "a woman"]      # optional: among which CLIP chooses for each image

    [words]
    adjective = ["happy", "sad"]
    noun = ["doctor", "nurse"]

Every combination of the words is a prompt, as in Bianchi et al. (2023, arXiv:2211.03759) and
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
    """Every combination of a template file's words, the last word changing fastest.

    A prompt's row has its word for each placeholder, and the labels if there are any; its category
    is its words.

    Raises:
      InputError: naming the file, and what in it cannot be used.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise BadValueError(f"it is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return _expanded(tomllib.loads(content.decode()))
    except FileNotFoundError:
        raise InputError(f"there is no template file {path}") from None
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as problem:
        raise InputError(f"{path} is not a readable TOML file: {problem}") from None
    except BadValueError as problem:
        raise InputError(f"template file {path}: {problem}") from None


def counts(prompts: Sequence[Prompt], owners: np.ndarray, labels: Sequence[str]) -> Table:
    """How often the images of each word show each label, with 95 % intervals (Wilson, 1927).

    Args:
      prompts: of an audit.
      owners: int [images], which of the prompts each image is of.
      labels: of each image what it shows; "" if nobody knows, and it is not counted.
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
        note="Of the images of each word: how many show each label, as a share with its 95 % "
        "interval (Wilson).",
        columns=("attribute", "word", "label", "images", "shown", "share", "low", "high"),
        rows=rows,
    )


def _expanded(said: dict) -> list[Prompt]:
    if unknown := said.keys() - KEYS:
        raise BadValueError(f"there is no key {_listed(unknown)}, only {_listed(KEYS)}")
    template = checks.text("template", said.get("template"))
    literals = re.split(r"\{(\w+)\}", template)
    literals, names = literals[::2], literals[1::2]
    if any({"{", "}"} & set(literal) for literal in literals):
        raise BadValueError("template has a brace that belongs to no {word}")
    words = _words(said.get("words"), names)
    count = math.prod(map(len, words.values()))
    if count > MAX_PROMPTS:
        raise BadValueError(f"its words combine to {count} prompts; at most {MAX_PROMPTS}")
    labels = said.get("labels", [])
    labels = {"labels": _texts("labels", labels, MAX_LABELS)} if labels else {}
    prompts = {}
    for number, chosen in enumerate(itertools.product(*words.values())):
        row = dict(zip(words, chosen, strict=True))
        parts = itertools.zip_longest(literals, (row[name] for name in names), fillvalue="")
        text = checks.text("a prompt", "".join(itertools.chain(*parts)))
        if text in prompts:
            raise BadValueError(f"two combinations of words give {checks.shown(text)}")
        prompts[text] = Prompt(f"{number:05d}", text, ", ".join(chosen), row | labels)
    return list(prompts.values())


def _words(said, names: list[str]) -> dict[str, list[str]]:
    """The words of each placeholder, in the template's order."""
    if not isinstance(said, dict):
        raise BadValueError("it has no table [words], the words for each {word} of the template")
    if not names:
        raise BadValueError("template has no {word} to be filled in")
    if missing := set(names) - said.keys():
        raise BadValueError(f"[words] has none for {_listed(missing)} of the template")
    if unused := said.keys() - set(names):
        raise BadValueError(f"[words] has {_listed(unused)}, which the template has no place for")
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
