"""Checks the files of CLIP's byte-pair tokenizer. Imports no JAX."""

import re
from pathlib import Path

from jaxdiff.checkpoint.component import TOKENIZER_FILES
from jaxdiff.checkpoint.json_files import MAX_JSON_BYTES, read_json
from jaxdiff.checkpoint.regular_file import opened
from jaxdiff.errors import InputError

LEAST_TOKENS = 3  # the start, one of the text, the end
NO_LIMIT = 1e30  # as written in old files
END_OF_WORD = "</w>"
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<\w+>")  # <|endoftext|>, <unk>: not made by a merge


def check_tokenizer(folder: Path) -> None:
    """Raises InputError unless the tokenizer's files are present and complete."""
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        _check_merges(vocabulary, merges)
    elif not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} lacks vocab.json and merges.txt; copy the checkpoint again")
    if (folder / "tokenizer.json").is_file():
        _check_model(folder / "tokenizer.json")
    if (folder / "tokenizer_config.json").is_file():
        _check_length(folder / "tokenizer_config.json")


def _check_model(path: Path) -> None:
    model = read_json(path).get("model")
    if not isinstance(model, dict) or not (model.get("vocab") and model.get("merges")):
        raise InputError(f"{path} lacks a vocabulary or merges; copy the checkpoint again")


def _check_length(path: Path) -> None:
    """Rejects a length that leaves no room between the start token and the end token."""
    length = read_json(path).get("model_max_length")
    if length in (None, NO_LIMIT):
        return
    if type(length) is not int or length < LEAST_TOKENS:
        raise InputError(
            f"{path}: model_max_length = {length!r} must be a whole number of at least "
            f"{LEAST_TOKENS} tokens; CLIP's is 77"
        )


def _check_merges(vocabulary_path: Path, merges_path: Path) -> None:
    """Raises InputError unless the merges make exactly the vocabulary's tokens.

    Truncated merges would change how texts are tokenized. As in CLIP and GPT-2, a token is a byte's
    symbol, with or without `END_OF_WORD`, or a merge of two tokens, or special.
    """
    vocabulary = read_json(vocabulary_path)
    ids = vocabulary.values()
    if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise InputError(
            f"{vocabulary_path}: its ids are not distinct whole numbers; copy the checkpoint again"
        )
    try:
        with opened(merges_path) as file:
            lines = file.read(MAX_JSON_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{merges_path} cannot be read ({error}); copy it again") from error
    made = set()
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version"):
            continue
        pair, token = line.split(" "), line.replace(" ", "")
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, token}:
            raise InputError(
                f"{merges_path}: line {number} does not merge two tokens of vocab.json into a "
                "third; copy the checkpoint again"
            )
        made.add(token)
    for token in vocabulary.keys() - made:
        if len(token.removesuffix(END_OF_WORD)) > 1 and not SPECIAL_TOKEN.fullmatch(token):
            raise InputError(
                f"{merges_path} never makes {token!r} of vocab.json; copy the checkpoint again"
            )
