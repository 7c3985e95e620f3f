"""Reads tokenizers with transformers, and keeps what it makes of their files.

transformers knows many forms of tokenizers, and takes most of a second to import. It turns each
into one of the library `tokenizers`, which is kept as JSON: later processes need only that.
"""

import importlib.metadata
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from jaxdiff import cache
from jaxdiff.checkpoint.component import TOKENIZER_FILES
from jaxdiff.checkpoint.fingerprint import fingerprint

LIBRARIES = ("tokenizers", "transformers")


@dataclass(frozen=True)
class FastTokenizer:
    """A tokenizer of the library `tokenizers`, which is thread-safe because nothing changes it.

    Attributes:
      tokenizer: it.
      size: one more than its largest id, since ids may have gaps.
      max_length: the most tokens of a text, as its files say.
      begin, end, pad: the ids of special tokens; None for those that it does not have.
      cuts_begin: whether texts that are too long are cut off at their beginning.
    """

    tokenizer: Tokenizer
    size: int
    max_length: int
    begin: int | None
    end: int | None
    pad: int | None
    cuts_begin: bool

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Returns a text's ids, with its special tokens if `special`."""
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def counts(self, texts: Sequence[str], *, special: bool) -> list[int]:
        """Returns how many ids each text has; takes all cores."""
        return [*map(len, self.tokenizer.encode_batch_fast(texts, add_special_tokens=special))]


def read(directory: Path, kind: str) -> FastTokenizer:
    """Reads a tokenizer's directory.

    Args:
      directory: its files; `refuse_other_kinds` and `require_one` have checked what they are.
      kind: the class of transformers that reads them.

    Raises:
      Exception: of any kind, whatever transformers raises.
    """
    files = {name: directory / name for name in TOKENIZER_FILES if (directory / name).is_file()}
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    identity = f"{kind} {fingerprint(files)} {versions}"
    fields = json.loads(cache.remembered("tokenizers", identity, lambda: _made(directory, kind)))
    tokenizer = Tokenizer.from_str(fields.pop("tokenizer"))
    tokenizer.encode_special_tokens = fields.pop("splits_special")
    return FastTokenizer(tokenizer, **fields)


def _made(directory: Path, kind: str) -> bytes:
    """Returns the fields of a `FastTokenizer` as JSON, with the settings that its own lacks."""
    with warnings.catch_warnings(action="ignore"):  # of tqdm, in notebooks without widgets
        import transformers

    found = getattr(transformers, kind).from_pretrained(directory)
    backend = found.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    fields = {
        "tokenizer": backend.to_str(),
        "splits_special": found.split_special_tokens,
        "size": max(found.get_vocab().values()) + 1,
        "max_length": found.model_max_length,
        "begin": found.bos_token_id,
        "end": found.eos_token_id,
        "pad": found.pad_token_id,
        "cuts_begin": found.truncation_side == "left",
    }
    return json.dumps(fields).encode()
