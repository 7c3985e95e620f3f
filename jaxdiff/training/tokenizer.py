"""Captions as token ids, and those of the sample grids."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from jaxdiff.engine.prompts import chunked_tokens
from jaxdiff.errors import InputError
from jaxdiff.worlds import shapes

PREVIEW_SEED, PREVIEW_IMAGES = 2**31, 48


class Tokenizer:
    """A checkpoint's tokenizer, for any thread."""

    def __init__(self, directory: Path, positions: int):
        """Reads a directory in the `CLIPTokenizer` format, for an encoder of so many positions.

        Raises:
          InputError: if there is none.
        """
        # Without this check transformers would look for the name on the Hub.
        if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise InputError(f"{directory} holds no tokenizer (no vocab.json, no tokenizer.json)")
        self._tokenizer = CLIPTokenizer.from_pretrained(directory)
        self._tokens = min(self._tokenizer.model_max_length, positions)
        self._lock = threading.Lock()  # truncation is a state of the tokenizer

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Captions to int32 [captions, tokens], as prompts are tokenized."""
        with self._lock:
            return chunked_tokens(self._tokenizer, captions, self._tokens, chunks=1)[:, 0]


def preview_captions() -> list[str]:
    """The captions of the sample grids: the same at every step of every run."""
    rng = np.random.default_rng(PREVIEW_SEED)
    return [shapes.sample(rng)[1] for _ in range(PREVIEW_IMAGES)]
