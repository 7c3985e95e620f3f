"""Converts prompts to token ids for Sana, whose text encoder gets an instruction before them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdiff.families.tokenizers import fast
from jaxdiff.families.tokenizers.tokenizer import refuse_other_kinds, require_one, usable


class InstructedTokens(NamedTuple):
    """Texts after an instruction, as rows of one length.

    Attributes:
      ids: int32 [texts, tokens], padded on the right.
      mask: bool [texts, tokens]: False for padding.
      kept: int32 [texts, kept tokens], the places of the tokens that the denoiser gets.
    """

    ids: np.ndarray
    mask: np.ndarray
    kept: np.ndarray


class InstructedTokenizer:
    """Gemma's tokenizer, which puts an instruction before prompts; see `tokens.Tokenizer`.

    Negative prompts get no instruction. The denoiser gets the first token and the last ones of a
    row, so that it does not see the instruction (Xie et al., 2024, arXiv:2410.10629, section 3.1).

    Attributes:
      tokens: the number of tokens that the denoiser gets.
    """

    def __init__(self, directory: Path, tokens: int, instruction: str):
        """Reads Gemma's tokenizer.

        Args:
          directory: the tokenizer's directory.
          tokens: the number of tokens that the denoiser gets.
          instruction: the text before prompts.

        Raises:
          InputError: if the files cannot be used.
        """
        self.tokens, self._instruction = tokens, instruction
        require_one(directory, "tokenizer.json")
        refuse_other_kinds(directory, "GemmaTokenizer")
        with usable(directory):
            self._tokenizer = fast.read(directory, "GemmaTokenizer")
            self._row = len(self._words(instruction)) + tokens - 2
            self(["a"])

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return self._tokenizer.size

    def __call__(
        self, texts: Sequence[str], chunks: int = 1, *, negative: bool = False
    ) -> InstructedTokens:
        """Returns rows of one length for prompts and negative prompts; `chunks` must be 1."""
        ids = np.full((len(texts), self._row), self._tokenizer.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        most = self.tokens if negative else self._row
        for row, seen, text in zip(ids, mask, texts, strict=True):
            words = self._words(self._prepared(text, negative))[:most]
            row[: len(words)] = words
            seen[: len(words)] = True
        kept = np.append(0, np.arange(most - self.tokens + 1, most)).astype(np.int32)
        return InstructedTokens(ids, mask, np.tile(kept, (len(texts), 1)))

    def lost(self, texts: Sequence[str], chunks: int = 1) -> list[int]:
        """Returns how many tokens at the end of each prompt are cut off."""
        prepared = [self._prepared(text, negative=False) for text in texts]
        counts = self._tokenizer.counts(prepared, special=True)
        return [max(0, count - self._row) for count in counts]

    def _prepared(self, text: str, negative: bool) -> str:
        text = text.lower().strip()
        return text if negative else self._instruction + text

    def _words(self, text: str) -> list[int]:
        return self._tokenizer.ids(text, special=True)
