"""Prompts as token ids, for CLIP's text encoders."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from jaxdiff.errors import InputError


class Tokenizer:
    """A checkpoint's tokenizer, for any thread.

    Attributes:
      tokens: of a chunk, its start and its end among them.
    """

    def __init__(self, directory: Path, positions: int):
        """Reads a directory in the `CLIPTokenizer` format, for an encoder of so many positions.

        Raises:
          InputError: if there is none.
        """
        # Without this check transformers would look for the name on the Hub.
        if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise InputError(f"{directory} contains no tokenizer (vocab.json or tokenizer.json)")
        self._tokenizer = CLIPTokenizer.from_pretrained(directory)
        self.tokens = min(self._tokenizer.model_max_length, positions)
        self._lock = threading.Lock()  # truncation is a state of the tokenizer

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return len(self._tokenizer)

    def __call__(self, texts: Sequence[str], chunks: int = 1) -> np.ndarray:
        """Token ids, int32 [texts, chunks, tokens]; see `chunked_tokens`."""
        with self._lock:
            return chunked_tokens(self._tokenizer, texts, self.tokens, chunks)


def chunked_tokens(
    tokenizer: CLIPTokenizer, texts: Sequence[str], tokens: int, chunks: int
) -> np.ndarray:
    """Token ids, int32 [texts, chunks, tokens]; what does not fit is cut.

    Each chunk has its own start and end, as if it were a prompt by itself, so that prompts may be
    longer than the encoder's positions. Each prompt has all its chunks, the last perhaps empty: its
    embedding does not depend on the prompts beside it.
    """
    room = tokens - 2  # beside start and end
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
