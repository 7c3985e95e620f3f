"""Checks the files of tokenizers: byte pairs, or Unigram as T5's. Imports no JAX."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from jaxdiff.checkpoint.component import TOKENIZER_FILES
from jaxdiff.checkpoint.json_files import MAX_JSON_BYTES, read_json
from jaxdiff.checkpoint.regular_file import opened
from jaxdiff.checks import shown
from jaxdiff.errors import InputError

SENTENCEPIECE = "spiece.model"  # a Unigram model in the form of the library of that name
LEAST_TOKENS = 3  # the start, one of the text, the end
NO_LIMIT = 1e30  # as written in old files
END_OF_WORD = "</w>"
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<\w+>")  # <|endoftext|>, <unk>: not made by a merge
SCORED = ([str, float], [str, int])
# Settings by which transformers would take the vocabulary from elsewhere.
ELSEWHERE = ("gguf_file", "init_inputs", "merges", "tokenizer_object", "vocab")


def check_tokenizer(folder: Path) -> None:
    """Raises InputError unless the tokenizer's files are present, complete and well formed."""
    # A folder or a dangling link is present, too; it is refused by name when it is read.
    present = [name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
    found = {name: read_json(folder / name) for name in present if name.endswith(".json")}
    lines = _lines(folder / "merges.txt") if "merges.txt" in present else None
    if SENTENCEPIECE in present:
        _bytes(folder / SENTENCEPIECE)
    if "vocab.json" in found and lines is not None:
        _check_merges(folder / "vocab.json", found["vocab.json"], folder / "merges.txt", lines)
    elif "tokenizer.json" not in found and SENTENCEPIECE not in present:
        raise InputError(
            f"{folder} lacks tokenizer.json, vocab.json with merges.txt and {SENTENCEPIECE}, of "
            "which a tokenizer has one; copy the checkpoint again"
        )
    checks = {
        "tokenizer.json": _check_model,
        "tokenizer_config.json": _check_config,
        "special_tokens_map.json": _check_config,  # transformers merges it into the other
        "added_tokens.json": _check_ids,
    }
    for name, check in checks.items():
        if name in found:
            check(folder / name, found[name])


def _lines(path: Path) -> list[str]:
    try:
        return _bytes(path).decode().splitlines()
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); copy it again") from error


def _bytes(path: Path) -> bytes:
    try:
        with opened(path) as file:
            return file.read(MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it again") from error


def _check_model(path: Path, content: dict) -> None:
    """Checks the vocabulary, the merges and the added tokens of a tokenizer.json."""
    model, added = content.get("model"), content.get("added_tokens")
    if isinstance(model, dict) and model.get("type") == "Unigram":
        _check_unigram(path, model)
    elif isinstance(model, dict) and model.get("vocab") and model.get("merges"):
        _check_byte_pairs(path, model["vocab"], model["merges"])
    else:
        raise InputError(f"{path} lacks a vocabulary or merges; copy the checkpoint again")
    if not isinstance(added, list):
        raise InputError(f"{path} lacks added_tokens, a list; copy the checkpoint again")
    for token in added:
        if not _is_token(token) or not _is_id(token.get("id")):
            raise _wrong_token(path, "added_tokens", token)


def _check_byte_pairs(path: Path, vocabulary: object, merges: object) -> None:
    _check_ids(path, vocabulary)
    for merge in merges if isinstance(merges, list) else [merges]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not _is_merge(pair, vocabulary):
            raise InputError(
                f"{path}: {shown(merge)} does not merge two tokens of the vocabulary into a third; "
                "copy the checkpoint again"
            )


def _check_unigram(path: Path, model: dict) -> None:
    """Checks the pieces, each with the logarithm of its probability (Kudo, 2018, 1804.10959)."""
    pieces, unknown = model.get("vocab"), model.get("unk_id")
    if not isinstance(pieces, list) or not _is_id(unknown) or unknown >= len(pieces):
        raise InputError(f"{path} lacks a vocabulary with unk_id; copy the checkpoint again")
    for piece in pieces:
        if not isinstance(piece, list) or [type(part) for part in piece] not in SCORED:
            raise InputError(
                f"{path}: {shown(piece)} is not a token and its score; copy the checkpoint again"
            )


def _check_config(path: Path, content: dict) -> None:
    """Checks the length and the tokens in one of the two files of settings."""
    length = content.get("model_max_length")
    # A shorter one leaves no room between the start token and the end token.
    is_length = type(length) is int and length >= LEAST_TOKENS
    if length not in (None, NO_LIMIT) and not is_length:
        raise InputError(
            f"{path}: model_max_length = {shown(length)} must be a whole number of at least "
            f"{LEAST_TOKENS} tokens; CLIP's is 77"
        )
    for key in ELSEWHERE:
        if content.get(key):
            raise InputError(f"{path}: {key} is not supported; remove it")
    _check_special(path, content)
    added = content.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise _wrong_token(path, "added_tokens_decoder", added)
    for number, token in added.items():
        if not re.fullmatch(r"[0-9]{1,9}", number) or not _is_token(token):
            raise _wrong_token(path, f"added_tokens_decoder: {number[:20]}", token)


def _check_special(path: Path, content: dict) -> None:
    """Checks the kinds of the special tokens, such as "eos_token"."""
    for key, token in content.items():
        is_text = token is None or isinstance(token, str)
        if key.endswith("_token") and not is_text and not _is_token(token):
            raise _wrong_token(path, key, token)


def _is_token(value: object) -> bool:
    """Whether a value describes a token, with flags such as "lstrip"."""
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0


def _wrong_token(path: Path, key: str, token: object) -> InputError:
    return InputError(f"{path}: {key} = {shown(token)} is not a token; copy the checkpoint again")


def _check_ids(path: Path, vocabulary: object) -> None:
    """Raises InputError unless a vocabulary maps tokens to distinct ids."""
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [vocabulary]
    if not all(map(_is_id, ids)) or len(set(ids)) < len(ids):
        raise InputError(
            f"{path}: its ids are not distinct whole numbers; copy the checkpoint again"
        )


def _is_merge(pair: object, vocabulary: dict) -> bool:
    """Whether a pair, and its concatenation, are tokens of the vocabulary."""
    if not isinstance(pair, list) or not all(isinstance(part, str) for part in pair):
        return False
    return len(pair) == 2 and vocabulary.keys() >= {*pair, "".join(pair)}


def _check_merges(
    vocabulary_path: Path, vocabulary: dict, merges_path: Path, lines: Iterable[str]
) -> None:
    """Raises InputError unless the merges make exactly the vocabulary's tokens.

    Truncated merges would change how texts are tokenized. As in CLIP and GPT-2, a token is a byte's
    symbol, with or without `END_OF_WORD`, or a merge of two tokens, or special.
    """
    _check_ids(vocabulary_path, vocabulary)
    made = set()
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version"):
            continue
        if not _is_merge(line.split(" "), vocabulary):
            raise InputError(
                f"{merges_path}: line {number} does not merge two tokens of vocab.json into a "
                "third; copy the checkpoint again"
            )
        made.add(line.replace(" ", ""))
    for token in vocabulary.keys() - made:
        if len(token.removesuffix(END_OF_WORD)) > 1 and not SPECIAL_TOKEN.fullmatch(token):
            raise InputError(
                f"{merges_path} never makes {shown(token)} of vocab.json; copy the checkpoint again"
            )
