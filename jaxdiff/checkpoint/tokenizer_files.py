"""Whether a tokenizer's folder is whole: CLIP's byte-pair encoding. Imports no JAX."""

import re
from pathlib import Path

from jaxdiff.checkpoint.components import MAX_JSON_BYTES, TOKENIZER_FILES, read_json
from jaxdiff.errors import InputError

LEAST_TOKENS = 3  # the beginning, one of the text, the end
NO_LIMIT = 1e30  # as old files say it
END_OF_WORD = "</w>"
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<\w+>")  # <|endoftext|>, <unk>: made by no merge


def check_tokenizer(folder: Path) -> None:
    """Raises InputError unless the tokenizer's files are there and whole."""
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
        raise InputError(f"{path} holds no vocabulary and merges; copy the checkpoint again")


def _check_length(path: Path) -> None:
    """Refuses what leaves no room between the tokens for the beginning and the end."""
    length = read_json(path).get("model_max_length")
    if length in (None, NO_LIMIT):
        return
    if type(length) is not int or length < LEAST_TOKENS:
        raise InputError(
            f"{path}: model_max_length = {length!r} must be a whole number of at least "
            f"{LEAST_TOKENS} tokens; CLIP's is 77"
        )


def _check_merges(vocabulary_path: Path, merges_path: Path) -> None:
    """Raises InputError unless each makes the other's tokens: cut merges would give other tokens.

    As in CLIP and GPT-2, a token is a byte's symbol, with or without `END_OF_WORD`, or a merge of
    two tokens, or special.
    """
    vocabulary = read_json(vocabulary_path)
    ids = vocabulary.values()
    if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise InputError(
            f"{vocabulary_path}: its ids are not distinct whole numbers; copy the checkpoint again"
        )
    try:
        with merges_path.open(encoding="utf-8") as file:
            lines = file.read(MAX_JSON_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{merges_path} cannot be read ({error}); copy it again") from error
    made = set()
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version"):
            continue
        pair, token = line.split(" "), line.replace(" ", "")
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, token}:
            raise InputError(
                f"{merges_path}: line {number} merges no two tokens of vocab.json into a third; "
                "copy the checkpoint again"
            )
        made.add(token)
    for token in vocabulary.keys() - made:
        if len(token.removesuffix(END_OF_WORD)) > 1 and not SPECIAL_TOKEN.fullmatch(token):
            raise InputError(
                f"{merges_path} makes no {token!r}, which vocab.json has; copy the checkpoint again"
            )
