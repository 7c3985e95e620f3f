"""Tokenizers of language models: both forms of T5's, rows of fixed length, and what is refused."""

import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import small_tokenizers
import tokenizers
import transformers

from jaxdiff.errors import InputError
from jaxdiff.families import tokenizers as families_tokenizers
from jaxdiff.families.tokenizers import clip
from jaxdiff.families.tokenizers.chat import ChatTokenizer
from jaxdiff.families.tokenizers.clip import ClipTokenizer
from jaxdiff.families.tokenizers.instructed import InstructedTokenizer
from jaxdiff.families.tokenizers.openers import t5_tokenizer
from jaxdiff.families.tokenizers.t5 import T5Tokenizer

TEXTS = ["a red circle", "  two  blue\tstars ", "", "naïve ﬁve 日本", "a" * 40, "a-b, c!"]
CORPUS = "a red circle two blue stars on the left of five green crosses naïve black white ring-b, !"


@pytest.fixture(scope="module")
def t5_folders(tmp_path_factory):
    """Returns a folder with SentencePiece's file and one with the same pieces in a tokenizer.json.

    The first is the form of PixArt's checkpoints, the second is what transformers writes today.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split() * 50),
        model_writer=model,
        vocab_size=35,
        model_type="unigram",
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        minloglevel=2,
    )
    plain = tmp_path_factory.mktemp("sentencepiece")
    (plain / "spiece.model").write_bytes(model.getvalue())
    (plain / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(found.id_to_piece(i), found.get_score(i)) for i in range(found.vocab_size())]
    converted = tmp_path_factory.mktemp("json")
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(converted)
    return plain, converted


def test_both_forms_of_t5s_tokenizer_give_the_same_tokens(t5_folders):
    ours, theirs = (T5Tokenizer(folder, 20)(TEXTS[:3] + TEXTS[4:]) for folder in t5_folders)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.mask, theirs.mask)


def test_a_row_ends_with_the_end_token_and_is_padded(t5_folders):
    for folder in t5_folders:
        tokenizer = T5Tokenizer(folder, 20, prepared=str.lower)
        (short, long, upper), mask = tokenizer(["a red circle", "a " * 40, "A RED CIRCLE"])
        assert short.dtype == np.int32
        assert short[mask[0].sum() - 1] == long[19] == 1
        assert not short[~mask[0]].any()
        np.testing.assert_array_equal(upper, short)
        whole = T5Tokenizer(folder, 200)(["a " * 40]).mask.sum()
        assert tokenizer.lost(["a red circle", "a " * 40]) == [0, whole - 20]


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_refused(t5_folders):
    with pytest.raises(InputError, match="belongs to another model"):
        t5_tokenizer(20, str, "text_encoder", t5_folders[0], {"vocab_size": 34})


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_broken_sentencepiece_file_is_one_line(tmp_path, t5_folders, content):
    folder = shutil.copytree(t5_folders[0], tmp_path / "tokenizer")
    (folder / "spiece.model").write_bytes(content)
    with pytest.raises(InputError, match=r"contains no usable tokenizer") as caught:
        T5Tokenizer(folder, 20)
    assert "\n" not in str(caught.value)


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def bytes_tokenizer():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate([*letters, *marks])},
        merges=[],
        additional_special_tokens=marks,
    )


def test_a_chat_surrounds_the_prompt(tmp_path):
    folder = saved(bytes_tokenizer(), tmp_path)
    tokenizer = ChatTokenizer(folder, 12, "<|im_start|>u\n", "<|im_end|>")
    ids, mask = tokenizer(["ab", "abcdefghijkl"])
    start, end, pad = 257, 258, 256
    assert ids[0, 0] == ids[1, 0] == start
    assert list(ids[0, 5:]) == [end, *[pad] * 6]
    assert mask.sum(axis=1).tolist() == [6, 12]
    assert tokenizer.lost(["ab", "abcdefghijkl"]) == [0, 4]


def test_an_instruction_goes_before_prompts_but_not_before_negative_prompts(tmp_path):
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    made = transformers.GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    tokenizer = InstructedTokenizer(saved(made, tmp_path), 6, "ab ")
    ids, mask, kept = tokenizer(["C d"])
    words = [pieces.index(piece) for piece in "ab▁c▁d"]
    assert ids[0, :6].tolist() == words
    assert mask.sum() == 6
    assert kept[0].tolist() == [0, 2, 3, 4, 5, 6]  # of rows of three, six and minus two tokens
    ids, mask, kept = tokenizer(["C d"], negative=True)
    assert ids[0, :3].tolist() == words[3:]
    assert kept[0].tolist() == list(range(6))
    assert tokenizer.lost(["abcdefgh"]) == [3 + 8 - 7]


@pytest.mark.parametrize("read", [ChatTokenizer, InstructedTokenizer])
def test_an_empty_folder_is_one_line(tmp_path, read):
    options = ("before", "after") if read is ChatTokenizer else ("instruction",)
    with pytest.raises(InputError, match="contains no tokenizer") as caught:
        read(tmp_path, 20, *options)
    assert "\n" not in str(caught.value)


def test_that_pytorch_is_missing_is_not_said():
    assert families_tokenizers.NO_PYTORCH in Path(transformers.__file__).read_text()
    logger = logging.getLogger("transformers")
    said = (f"{families_tokenizers.NO_PYTORCH} More", "another warning")
    records = [logging.makeLogRecord({"msg": message}) for message in said]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


def test_clip_loses_as_many_tokens_by_words_as_at_once(tmp_path):
    tokenizer = ClipTokenizer(saved(small_tokenizers.clip(), tmp_path), 3)
    parts = ["red", "Circle,", "it's", "<|endoftext|>", "a<|endoftext|>b", "\n", "", "a\tb", "--x9"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(parts, 12)) for _ in range(100)] + ["é 日 \u0149", "a"]
    ids = small_tokenizers.clip()(texts, add_special_tokens=False).input_ids
    whole = [max(0, len(each) - 1) for each in ids]
    assert clip.divides_at_spaces(clip.read_tokenizer(tmp_path))
    assert tokenizer.lost(texts) == whole


def test_a_token_with_a_space_is_not_divided(tmp_path):
    slow = small_tokenizers.clip()
    slow.add_tokens(["two stars"])
    tokenizer = ClipTokenizer(saved(slow, tmp_path), 3)
    assert not clip.divides_at_spaces(clip.read_tokenizer(tmp_path))
    assert tokenizer.lost(["a two stars"]) == [1]
