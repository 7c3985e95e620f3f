"""Converts prompts to token ids for language models that were trained on conversations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdiff.families.tokenizers import fast
from jaxdiff.families.tokenizers.tokenizer import (
    Tokens,
    refuse_other_kinds,
    require_one,
    usable,
)


class ChatTokenizer:
    """A tokenizer that puts the prompt into a conversation; see `tokens.Tokenizer`.

    Attributes:
      tokens: the number of tokens of a row, with those of the conversation around the prompt.
    """

    def __init__(self, directory: Path, tokens: int, before: str, after: str):
        """Reads Qwen's byte-level tokenizer.

        Args:
          directory: the tokenizer's directory.
          tokens: the number of tokens of a row.
          before, after: the text around the prompt. It is the family's, not the checkpoint's: a
            chat template in a file is a program.

        Raises:
          InputError: if the files cannot be used.
        """
        self.tokens, self._around = tokens, (before, after)
        require_one(directory, "vocab.json", "tokenizer.json")
        refuse_other_kinds(directory, "Qwen2Tokenizer")
        with usable(directory):
            self._tokenizer = fast.read(directory, "Qwen2Tokenizer")
            if self._tokenizer.pad is None:
                raise ValueError("it has no pad_token")
            self(["a"])

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return self._tokenizer.size

    def __call__(self, texts: Sequence[str], chunks: int = 1, *, negative: bool = False) -> Tokens:
        """Returns rows of `tokens` ids, cut off at the end; `chunks` must be 1."""
        ids = np.full((len(texts), self.tokens), self._tokenizer.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, seen, text in zip(ids, mask, texts, strict=True):
            words = self._words(text)[: self.tokens]
            row[: len(words)] = words
            seen[: len(words)] = True
        return Tokens(ids, mask)

    def lost(self, texts: Sequence[str], chunks: int = 1) -> list[int]:
        """Returns how many tokens at the end of each text, with what follows it, are cut off."""
        counts = self._tokenizer.counts([*map(self._whole, texts)], special=True)
        return [max(0, count - self.tokens) for count in counts]

    def _words(self, text: str) -> list[int]:
        return self._tokenizer.ids(self._whole(text), special=True)

    def _whole(self, text: str) -> str:
        before, after = self._around
        return before + text + after
