"""Converts prompts to token ids for T5's text encoders."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jaxdiff.checkpoint.tokenizer_files import SENTENCEPIECE
from jaxdiff.families.tokenizers import fast
from jaxdiff.families.tokenizers.tokenizer import (
    Tokens,
    refuse_other_kinds,
    require_one,
    usable,
)


class T5Tokenizer:
    """T5's tokenizer, which fills a row of fixed length; see `tokens.Tokenizer`.

    Attributes:
      tokens: the number of tokens of a row, with the end token.
    """

    def __init__(self, directory: Path, tokens: int, *, prepared: Callable[[str], str] = str):
        """Reads tokenizer.json or, without it, SentencePiece's file.

        Args:
          directory: the tokenizer's directory.
          tokens: the number of tokens of a row.
          prepared: what the family does to every prompt before.

        Raises:
          InputError: if the files cannot be used.
        """
        self.tokens, self._prepared = tokens, prepared
        require_one(directory, "tokenizer.json", SENTENCEPIECE)
        refuse_other_kinds(directory, "T5Tokenizer")
        with usable(directory):
            if (directory / "tokenizer.json").is_file():
                self._read_json(directory)
            else:
                self._read_sentencepiece(directory)
            self(["a"])

    def _read_json(self, directory: Path) -> None:
        found = fast.read(directory, "T5Tokenizer")
        self._end, self._pad, self._size = found.end, found.pad, found.size
        self._encode = partial(found.ids, special=False)
        self._counts = partial(found.counts, special=False)

    def _read_sentencepiece(self, directory: Path) -> None:
        import sentencepiece

        found = sentencepiece.SentencePieceProcessor(model_file=str(directory / SENTENCEPIECE))
        self._end, self._pad, self._size = found.eos_id(), found.pad_id(), found.vocab_size()
        self._encode = found.encode
        self._counts = lambda texts: [*map(len, found.encode(texts))]

    def __len__(self) -> int:
        """The size of the vocabulary: one more than its largest id."""
        return self._size

    def __call__(self, texts: Sequence[str], chunks: int = 1, *, negative: bool = False) -> Tokens:
        """Returns rows of `tokens` ids, each ended by the end token; `chunks` must be 1."""
        ids = np.full((len(texts), self.tokens), self._pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, seen, text in zip(ids, mask, texts, strict=True):
            words = [*self._encode(self._prepared(text))[: self.tokens - 1], self._end]
            row[: len(words)] = words
            seen[: len(words)] = True
        return Tokens(ids, mask)

    def lost(self, texts: Sequence[str], chunks: int = 1) -> list[int]:
        """Returns how many tokens at the end of each text are cut off."""
        # A character makes one token at most, and the first word another one.
        long = [text for text in texts if not text.isascii() or len(text) + 2 > self.tokens]
        counts = dict(zip(long, self._counts([*map(self._prepared, long)]), strict=True))
        return [max(0, counts.get(text, 0) + 1 - self.tokens) for text in texts]
