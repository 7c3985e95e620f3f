"""The bundled tokenizer: reproduced byte for byte, with one token for each word of a caption."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.errors import InputError
from jaxdiff.families.tokenizers.clip import ClipTokenizer
from jaxdiff.worlds.shapes.captions import draw_caption

TOOL = Path(__file__).parents[2] / "tools" / "make_tokenizer.py"
DIRECTORY = BUNDLED["shapes64"] / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(DIRECTORY)


def test_the_tool_makes_the_bundled_files(tmp_path):
    subprocess.run([sys.executable, TOOL, tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in DIRECTORY.iterdir()}


def test_each_word_of_a_caption_is_one_token(tokenizer):
    rng = np.random.default_rng(0)
    captions = {draw_caption(rng).text() for _ in range(5000)}
    assert len(captions) > 1000
    for caption in captions:
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == len(caption.split()) + 2 <= tokenizer.model_max_length


def test_texts_begin_end_and_are_padded_as_clip_does(tokenizer):
    tokens = tokenizer("a star", padding="max_length", truncation=True).input_ids
    assert len(tokens) == tokenizer.model_max_length == 24
    assert tokens[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert set(tokens[3:]) == {tokenizer.eos_token_id} == {len(tokenizer) - 1}
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["Five CROSSES, a dog.", "naïve 日本 🎉", "\x00\x7f \u2028", ""])
def test_every_text_can_be_tokenized(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in tokens


def slow_tokens(word: str, vocabulary: dict, ranks: dict) -> list[int]:
    """Tokenizes a word by the plain algorithm, from vocab.json and merges.txt alone."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(known)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return [vocabulary[part] for part in parts]


def test_vocabulary_and_merges_agree_with_the_fast_tokenizer(tokenizer):
    vocabulary = json.loads((DIRECTORY / "vocab.json").read_text())
    merges = (DIRECTORY / "merges.txt").read_text().splitlines()
    assert merges[0] == "#version: 0.2"
    ranks = {tuple(line.split()): rank for rank, line in enumerate(merges[1:])}
    for word in ("circles", "backgrounds", "purplish", "a", "reddening", "star", "xylophone"):
        fast = tokenizer(word, add_special_tokens=False).input_ids
        assert fast == slow_tokens(word, vocabulary, ranks)


def test_loading_it_needs_neither_torch_nor_the_network():
    code = (
        "import socket, sys; asked = []\n"
        "socket.getaddrinfo = lambda *host, **_: asked.append(host)\n"
        "from transformers import CLIPTokenizer\n"
        f"CLIPTokenizer.from_pretrained({str(DIRECTORY)!r})\n"
        "assert not asked and 'torch' not in sys.modules, asked"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_next_process_reads_it_without_transformers(tmp_path, tokenizer):
    texts = ["Five CROSSES, a dog.", "naïve 日本 🎉", "a <|endoftext|> b", "word " * 99]
    code = (
        "import json, sys; from pathlib import Path\n"
        "from jaxdiff.families.tokenizers.clip import ClipTokenizer\n"
        f"tokens = ClipTokenizer(Path({str(DIRECTORY)!r}), 77)({texts!r})\n"
        "print(json.dumps(['transformers' in sys.modules, tokens[:, 0].tolist()]))"
    )
    run = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    outputs = [
        json.loads(subprocess.check_output(run, env=environment, stderr=subprocess.DEVNULL))
        for _ in range(2)
    ]
    expected = tokenizer(texts, padding="max_length", truncation=True).input_ids
    assert outputs == [[True, expected], [False, expected]]


def test_an_encoder_without_room_for_a_text_is_rejected():
    assert ClipTokenizer(DIRECTORY, positions=3).tokens == 3
    with pytest.raises(InputError, match="a prompt may have only 2 tokens"):
        ClipTokenizer(DIRECTORY, positions=2)


def test_whatever_transformers_raises_is_one_line(tmp_path):
    (tmp_path / "vocab.json").write_text("[")
    with pytest.raises(
        InputError, match=r"contains no usable tokenizer \(\w+: .*\); copy"
    ) as caught:
        ClipTokenizer(tmp_path, 77)
    assert "\n" not in str(caught.value)
