"""Converts prompts to token ids for CLIP's text encoders."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdiff.checkpoint.tokenizer_files import LEAST_TOKENS
from jaxdiff.errors import InputError
from jaxdiff.families.tokenizers import fast
from jaxdiff.families.tokenizers.fast import FastTokenizer
from jaxdiff.families.tokenizers.tokenizer import refuse_other_kinds, require_one, usable

# The special tokens that it needs, as its files call them.
TOKENS = {"begin": "bos_token", "end": "eos_token", "pad": "pad_token"}


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
        self.tokens = min(self._tokenizer.max_length, positions)
        if self.tokens < LEAST_TOKENS:
            raise InputError(
                f"{directory} has no room for a text: a prompt may have only {self.tokens} tokens, "
                "with its start and end; use another model"
            )

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return self._tokenizer.size

    def __call__(
        self, texts: Sequence[str], chunks: int = 1, *, negative: bool = False
    ) -> np.ndarray:
        """Returns token ids, int32 [texts, chunks, tokens]; see `chunked_tokens`."""
        return chunked_tokens(self._tokenizer, texts, self.tokens, chunks)

    def lost(self, texts: Sequence[str], chunks: int = 1) -> list[int]:
        """Returns how many tokens at the end of each text are cut off."""
        most = chunks * (self.tokens - 2)
        # A token has at least one byte.
        long = [text for text in texts if not text.isascii() or len(text) > most]
        counts = dict(zip(long, self._tokenizer.counts(long, special=False), strict=True))
        return [max(0, counts.get(text, 0) - most) for text in texts]


def read_tokenizer(directory: Path) -> FastTokenizer:
    """Reads a tokenizer in the `CLIPTokenizer` format.

    Raises:
      InputError: if it cannot be used.
    """
    with usable(directory):
        tokenizer = fast.read(directory, "CLIPTokenizer")
        for name in ("begin", "end", "pad"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"it has no {TOKENS[name]}")
        chunked_tokens(tokenizer, ["a"], LEAST_TOKENS, 1)
    return tokenizer


def chunked_tokens(
    tokenizer: FastTokenizer, texts: Sequence[str], tokens: int, chunks: int
) -> np.ndarray:
    """Returns token ids, int32 [texts, chunks, tokens]; truncates texts that are too long.

    Each chunk has its own start and end tokens, like a prompt of its own, so that prompts may be
    longer than the encoder's maximum. Every prompt gets all chunks, even empty ones, so that its
    embedding does not depend on the other prompts in the batch.
    """
    room = tokens - 2  # without start and end
    most = chunks * room
    ids = np.full((len(texts), chunks, tokens), tokenizer.pad, np.int32)
    ids[:, :, 0] = tokenizer.begin
    for row, text in zip(ids, texts, strict=True):
        words = tokenizer.ids(text, special=False)
        words = words[-most:] if tokenizer.cuts_begin else words[:most]
        for i, chunk in enumerate(row):
            part = words[i * room : (i + 1) * room]
            chunk[1 : len(part) + 1] = part
            chunk[len(part) + 1] = tokenizer.end
    return ids
