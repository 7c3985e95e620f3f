"""What tokenizers have in common: how a model's prompts become token ids."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.errors import InputError

MAX_REASON_CHARACTERS = 200
KINDS = ("CLIPTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "T5Tokenizer")


class Tokens(NamedTuple):
    """Texts of different lengths as rows of one length.

    Attributes:
      ids: int32 [texts, tokens], padded on the right.
      mask: bool [texts, tokens]: False for padding.
    """

    ids: np.ndarray
    mask: np.ndarray


class Tokenizer(Protocol):
    """The tokenizer of a text encoder; thread-safe.

    Attributes:
      tokens: the number of tokens of a row (of a chunk, for CLIP), with special ones.
    """

    tokens: int

    def __len__(self) -> int:
        """The size of the vocabulary: one more than its largest id, since ids may have gaps."""

    def __call__(self, texts: Sequence[str], chunks: int = 1, *, negative: bool = False) -> Any:
        """Returns what the family's `encode_text` takes: a tree of arrays [texts, ...].

        Args:
          texts: any number of prompts, of which those that are too long are cut off at the end.
          chunks: as in `Options.prompt_chunks`.
          negative: whether they are negative prompts, which some families treat differently.
        """

    def lost(self, texts: Sequence[str], chunks: int = 1) -> list[int]:
        """Returns how many tokens at the end of each text are cut off."""


def of_checkpoint(checkpoint: Checkpoint) -> dict[str, Tokenizer]:
    """Reads the tokenizer of each of a checkpoint's text encoders.

    Raises:
      InputError: if one of them cannot be used, or is not that of its text encoder.
    """
    return {
        name: checkpoint.family.tokenizer(name, folder, checkpoint.config(name))
        for name, folder in checkpoint.tokenizers.items()
    }


def fitting(tokenizer: Tokenizer, directory: Path, name: str, vocab_size: object) -> Tokenizer:
    """Returns the tokenizer of a text encoder with this name and `vocab_size`.

    Raises:
      InputError: if the text encoder lacks some of its tokens.
    """
    if not isinstance(vocab_size, int) or len(tokenizer) > vocab_size:
        raise InputError(
            f"{directory} has {len(tokenizer)} tokens, but {name} has only {vocab_size}; it "
            "belongs to another model; copy the checkpoint again"
        )
    return tokenizer


def require_one(directory: Path, *names: str) -> None:
    """Raises InputError unless a tokenizer's directory has one of these files.

    Without them, transformers would look for the directory's name on the Hub, or make a tokenizer
    that has hardly any tokens.
    """
    if not any((directory / name).is_file() for name in names):
        raise InputError(f"{directory} contains no tokenizer ({' or '.join(names)}); copy it again")


def refuse_other_kinds(directory: Path, kind: str) -> None:
    """Raises InputError if a tokenizer's files are of one of `KINDS` other than this one.

    transformers reads many of them as each other, with other tokens than the text encoder knows.
    """
    file = directory / "tokenizer_config.json"
    found = read_json(file).get("tokenizer_class") if file.is_file() else None
    if isinstance(found, str) and found.removesuffix("Fast") in set(KINDS) - {kind}:
        raise InputError(
            f"{file}: tokenizer_class = {found!r}, but the text encoder needs a {kind}; it belongs "
            "to another model; copy the checkpoint again"
        )


@contextlib.contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Turns what other libraries raise about a tokenizer's files into an InputError of one line."""
    try:
        yield
    except Exception as error:  # they raise exceptions of every kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON_CHARACTERS]
        raise InputError(
            f"{directory} contains no usable tokenizer ({reason}); copy the checkpoint again"
        ) from error
