"""Converts prompts to token ids for CLIP's text encoders."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from jaxdiff.checkpoint.tokenizer_files import LEAST_TOKENS
from jaxdiff.errors import InputError
from jaxdiff.families.tokenizers.tokenizer import in_one_line, refuse_other_kinds, require_one


class ClipTokenizer:
    """CLIP's tokenizer, which cuts a prompt into chunks; see `tokens.Tokenizer`.

    Attributes:
      tokens: the number of tokens of a chunk, including its start and end tokens.
    """

    def __init__(self, directory: Path, positions: int):
        """Reads a directory in the `CLIPTokenizer` format.

        Args:
          directory: the tokenizer's directory.
          positions: the maximum number of tokens of the text encoder.

        Raises:
          InputError: if the directory contains no tokenizer, or one that cannot be used.
        """
        require_one(directory, "vocab.json", "tokenizer.json")
        refuse_other_kinds(directory, "CLIPTokenizer")
        self._tokenizer = read_tokenizer(directory)
        self.tokens = min(self._tokenizer.model_max_length, positions)
        if self.tokens < LEAST_TOKENS:
            raise InputError(
                f"{directory} has no room for a text: a prompt may have only {self.tokens} tokens, "
                "with its start and end; use another model"
            )
        self._lock = threading.Lock()  # the tokenizer's truncation setting is mutable state

    def __len__(self) -> int:
        """The size of the vocabulary: one more than its largest id, since ids may have gaps."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def __call__(
        self, texts: Sequence[str], chunks: int = 1, *, negative: bool = False
    ) -> np.ndarray:
        """Returns token ids, int32 [texts, chunks, tokens]; see `chunked_tokens`."""
        with self._lock:
            return chunked_tokens(self._tokenizer, texts, self.tokens, chunks)

    def lost(self, text: str, chunks: int = 1) -> int:
        """Returns how many tokens at the end of a text are cut off."""
        most = chunks * (self.tokens - 2)
        if text.isascii() and len(text) <= most:  # a token has at least one byte
            return 0
        with self._lock:
            words = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return max(0, len(words) - most)


def read_tokenizer(directory: Path) -> CLIPTokenizer:
    """Reads a tokenizer with transformers, which raises exceptions of every kind.

    Raises:
      InputError: if transformers cannot use it.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(directory)
        for name in ("bos_token", "eos_token", "pad_token"):
            if getattr(tokenizer, f"{name}_id") is None:
                raise ValueError(f"it has no {name}")
        chunked_tokens(tokenizer, ["a"], LEAST_TOKENS, 1)
    except Exception as error:
        raise InputError(
            f"{directory} contains no usable tokenizer ({in_one_line(error)}); copy the checkpoint "
            "again"
        ) from error
    return tokenizer


def chunked_tokens(
    tokenizer: CLIPTokenizer, texts: Sequence[str], tokens: int, chunks: int
) -> np.ndarray:
    """Returns token ids, int32 [texts, chunks, tokens]; truncates texts that are too long.

    Each chunk has its own start and end tokens, like a prompt of its own, so that prompts may be
    longer than the encoder's maximum. Every prompt gets all chunks, even empty ones, so that its
    embedding does not depend on the other prompts in the batch.
    """
    room = tokens - 2  # without start and end
    most = chunks * room
    ids = np.full((len(texts), chunks, tokens), tokenizer.pad_token_id, np.int32)
    ids[:, :, 0] = tokenizer.bos_token_id
    for row, text in zip(ids, texts, strict=True):
        words = tokenizer(text, add_special_tokens=False, truncation=True, max_length=most)[
            "input_ids"
        ]
        for i, chunk in enumerate(row):
            part = words[i * room : (i + 1) * room]
            chunk[1 : len(part) + 1] = part
            chunk[len(part) + 1] = tokenizer.eos_token_id
    return ids
