"""Converts prompts to token ids for CLIP's text encoders."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Regex, normalizers, pre_tokenizers

from jaxdiff.checkpoint.tokenizer_files import LEAST_TOKENS
from jaxdiff.errors import InputError
from jaxdiff.families.tokenizers import fast
from jaxdiff.families.tokenizers.fast import FastTokenizer
from jaxdiff.families.tokenizers.tokenizer import refuse_other_kinds, require_one, usable

# The special tokens that it needs, as its files call them.
TOKENS = {"begin": "bos_token", "end": "eos_token", "pad": "pad_token"}

# What CLIPTokenizer of transformers does to a text before it looks for merges.
NORMALIZER = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
)
PARTS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
PRE_TOKENIZER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(PARTS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
REMEMBERED_WORDS = 2**14  # of at most 4000 characters each


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
        self._divides = divides_at_spaces(self._tokenizer)
        self._count = lru_cache(REMEMBERED_WORDS)(self._counted)
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
        by_words = {text for text in long if self._divides and text.isascii()}
        whole = [text for text in long if text not in by_words]
        counts = dict(zip(whole, self._tokenizer.counts(whole, special=False), strict=True))
        # Words repeat, so that most of them need not be counted again.
        counts |= {text: sum(map(self._count, text.split(" "))) for text in by_words}
        return [max(0, counts.get(text, 0) - most) for text in texts]

    def _counted(self, word: str) -> int:
        return len(self._tokenizer.ids(word, special=False))


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


def divides_at_spaces(tokenizer: FastTokenizer) -> bool:
    """Returns whether the ids of ASCII text are those of its words, one after the other.

    That is so where no token has a space: neither those that the merges make of a part of the text,
    nor those that were added to the vocabulary.
    """
    made = tokenizer.tokenizer
    steps = (made.normalizer, NORMALIZER), (made.pre_tokenizer, PRE_TOKENIZER)
    added = [token.content for token in made.get_added_tokens_decoder().values()]
    return (
        all(repr(ours) == repr(usual) for ours, usual in steps)
        and made.model.dropout is None
        and all(content.split() == [content] for content in added)
    )


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
