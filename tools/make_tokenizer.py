"""Builds the bundled model's tokenizer: a byte-level BPE with one token for each caption word.

    python tools/make_tokenizer.py jaxdiff/assets/shapes64/tokenizer

Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json in the format of
CLIPTokenizer. The ids follow OpenAI's CLIP: 256 bytes, the 256 bytes at the end of a word, one
token per merge, then the two special tokens, so the end of the text has the highest id. Words
that are not in the list are split into pieces and bytes, so no token is ever unknown.
"""

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

CAPTION_WORDS = (
    *("a", "an", "and", "on", "of", "left", "right", "above", "below", "background"),
    *("one", "two", "three", "four", "five"),
    *("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    *("white", "gray", "black"),
    *("circle", "square", "triangle", "star", "cross", "ring"),
    *("circles", "squares", "triangles", "stars", "crosses", "rings"),
)
# Not used in captions yet; reserved so that richer captions keep the same vocabulary.
SPARE_WORDS = ("the", "to", "is", "in", "with", "grey", "over", "under", "photo", "image")

END_OF_WORD = "</w>"
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
MODEL_MAX_LENGTH = 24


def byte_symbols() -> list[str]:
    """Returns the printable character for each byte, in the order of GPT-2 and CLIP."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Runs byte pair encoding (Sennrich et al. 2016, algorithm 1) until each word is one token."""
    spellings = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while any(len(spelling) > 1 for spelling in spellings):
        pairs = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        spellings = [merge_pair(spelling, best) for spelling in spellings]
        merges.append(best)
    return merges


def merge_pair(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    """Replaces each occurrence of the pair in the spelling, from the left, with one symbol."""
    merged, i = [], 0
    while i < len(spelling):
        width = 2 if tuple(spelling[i : i + 2]) == pair else 1
        merged.append("".join(spelling[i : i + width]))
        i += width
    return merged


def write_tokenizer(directory: Path) -> None:
    """Writes the four files into `directory`; the bytes are the same every time."""
    symbols = byte_symbols()
    merges = learn_merges(CAPTION_WORDS + SPARE_WORDS)
    tokens = [
        *symbols,
        *(symbol + END_OF_WORD for symbol in symbols),
        *("".join(pair) for pair in merges),
        *(START_OF_TEXT, END_OF_TEXT),
    ]
    special_tokens = {
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MODEL_MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special_tokens,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", special_tokens)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Writes indented JSON that ends with a newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    write_tokenizer(parser.parse_args().directory)
