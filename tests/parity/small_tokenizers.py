"""Small tokenizers of the real kinds, made offline."""

import string
from pathlib import Path

import transformers

WORDS = [
    "a",
    "red",
    "circle",
    "two",
    "blue",
    "stars",
    "ring",
    "black",
    "on",
    "the",
    "left",
    "of",
    "green",
    "square",
]


BUNDLED = Path(__file__).parents[2] / "jaxdiff" / "assets" / "shapes64" / "tokenizer"


def clip(pad: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """The bundled model's, with a padding token."""
    return transformers.CLIPTokenizer.from_pretrained(BUNDLED, pad_token=pad)


def t5() -> transformers.T5Tokenizer:
    """T5's kind: Unigram pieces with scores, then the sentinels."""
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0 - i / 100) for i, letter in enumerate(letters)]
    pieces += [(f"▁{word}", -1.0 - i / 100) for i, word in enumerate(WORDS)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=100)
