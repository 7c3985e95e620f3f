"""Template files: valid and invalid ones, and counts of what their images show."""

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.evaluation import audits
from jaxdiff.evaluation.benchmarks import manifest_rows, prompt_of, read
from jaxdiff.evaluation.intervals import wilson

TEMPLATE = """
template = "a photo of a {adjective} {noun}, so {adjective}"
labels = ["a man", "a woman"]

[words]
noun = ["doctor", "nurse", "cook"]
adjective = ["happy", "sad"]
"""


def file_of(folder, text: str):
    path = folder / "audit.toml"
    path.write_text(text)
    return path


def test_every_combination_of_words_is_a_prompt(tmp_path):
    prompts = read("audit", file_of(tmp_path, TEMPLATE))
    assert [prompt.text for prompt in prompts[:2]] == [
        "a photo of a happy doctor, so happy",
        "a photo of a happy nurse, so happy",
    ]
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 6
    assert prompts[5].id == "00005"
    assert prompts[5].category == "sad, cook"
    assert prompts[5].row == {"adjective": "sad", "noun": "cook", "labels": ["a man", "a woman"]}
    for row, prompt in zip(manifest_rows(prompts, 8), prompts, strict=True):
        assert prompt_of(row, row["id"], row["prompt"]) == prompt


WORDS = '[words]\nnoun = ["doctor"]\n'
BAD_TEMPLATES = {
    "unknown": ('template = "a {noun} and {other}"\n' + WORDS, "lacks 'other', which template"),
    "unused": ('template = "a {noun}"\n' + WORDS + 'place = ["Rome"]', "has 'place', which"),
    "no words": ('template = "a {noun}"', r"no table \[words\]"),
    "no placeholder": ('template = "a cup"\n' + WORDS, r"no \{word\} to fill in"),
    "brace": ('template = "a {noun} {"\n' + WORDS, "a brace that is not part of a"),
    "attribute": ('template = "a {noun.real}"\n' + WORDS, "a brace that is not part of a"),
    "no template": (WORDS, "template must be text, not None"),
    "no list": ('template = "a {noun}"\n[words]\nnoun = "cup"', "noun must be a list of"),
    "empty list": ('template = "a {noun}"\n[words]\nnoun = []', "noun must be a list of"),
    "no text": ('template = "a {noun}"\n[words]\nnoun = [7]', "each of noun must be text, not 7"),
    "empty word": ('template = "a {noun}"\n[words]\nnoun = [" "]', "noun has an empty text"),
    "word twice": ('template = "a {noun}"\n[words]\nnoun = ["x", "x"]', "noun has 'x' twice"),
    "prompt twice": (
        'template = "a {b}{c}"\n[words]\nb = ["x", "xy"]\nc = ["yz", "z"]',
        "two combinations of words both give 'a xyz'",
    ),
    "key": ('template = "a {noun}"\nimages = 4\n' + WORDS, "unknown key 'images'; known keys"),
    "labels": ('template = "a {noun}"\nlabels = "x"\n' + WORDS, "labels must be a list"),
    "no TOML": ("template = ", "not a readable TOML file"),
    "too large": ("#" * 2**21, "larger than 1 MiB"),
    "too many": (
        f'template = "{{a}} {{b}}"\n[words]\na = {[str(i) for i in range(400)]}\n'
        f"b = {[str(i) for i in range(400)]}",
        "make 160000 prompts; at most 100000",
    ),
}


@pytest.mark.parametrize("fault", BAD_TEMPLATES)
def test_an_invalid_template_gives_a_one_line_error(tmp_path, fault):
    text, message = BAD_TEMPLATES[fault]
    path = file_of(tmp_path, text)
    with pytest.raises(InputError, match=message) as raised:
        audits.read(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_template_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"template file .* does not exist"):
        audits.read(tmp_path / "audit.toml")
    (tmp_path / "latin.toml").write_bytes(b'template = "\xff"')
    with pytest.raises(InputError, match="not a readable TOML file"):
        audits.read(tmp_path / "latin.toml")


def test_counts_match_a_loop_and_have_wilson_intervals(tmp_path):
    prompts = read("audit", file_of(tmp_path, TEMPLATE))
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(len(prompts)), 40)
    labels = rng.choice(["a man", "a woman", ""], len(owners), p=[0.6, 0.3, 0.1]).tolist()
    table = audits.counts(prompts, owners, labels)
    assert [row[:3] for row in table.rows[:3]] == [
        ["adjective", "happy", "a man"],
        ["adjective", "happy", "a woman"],
        ["adjective", "sad", "a man"],
    ]
    assert len(table.rows) == (2 + 3) * 2
    for row in table.rows:
        attribute, word, label, images, shown, share, low, high = row
        own = [
            said
            for said, owner in zip(labels, owners, strict=True)
            if prompts[owner].row[attribute] == word and said
        ]
        assert (images, shown) == (len(own), own.count(label))
        assert share == shown / images
        assert (low, high) == tuple(map(float, wilson(shown, images)))
        assert len(row) == len(table.columns)


def test_a_word_without_images_has_no_share(tmp_path):
    prompts = read("audit", file_of(tmp_path, TEMPLATE))
    table = audits.counts(prompts, np.array([0, 5]), ["a man", ""])
    rows = {(row[1], row[2]): row[3:] for row in table.rows}
    assert rows["doctor", "a man"][:3] == [1, 1, 1.0]
    assert rows["cook", "a man"] == [0, 0, None, 0.0, 1.0]
    assert audits.counts(prompts, np.array([0]), [""]).rows == []
