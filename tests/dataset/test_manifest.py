import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdiff.dataset import manifest as manifests
from jaxdiff.dataset.manifest_readers import Entry
from jaxdiff.errors import InputError


def read_file(path, **said) -> list[Entry]:
    (source,) = manifests.find(path).sources
    return list(manifests.read(source, **said))


@pytest.fixture
def read(tmp_path):
    def read(name: str, content: bytes, **said) -> list[Entry]:
        path = tmp_path / name
        path.write_bytes(content)
        return read_file(path, **said)

    return read


def prompts(entries) -> list[str]:
    return [entry.values["prompt"] for entry in entries if entry.values]


FILES = {
    "p.txt": b"one\ntwo, three\n",
    "p.jsonl": b'{"prompt": "one"}\n{"prompt": "two, three"}\n',
    "p.csv": b'prompt,n\none,1\n"two, three",2\n',
    "p.tsv": b"prompt\tn\none\t1\ntwo, three\t2\n",
}


@pytest.mark.parametrize("name", FILES)
def test_every_text_format_is_read_also_gzipped(read, name):
    assert prompts(read(name, FILES[name])) == ["one", "two, three"]
    assert prompts(read(f"{name}.gz", gzip.compress(FILES[name]))) == ["one", "two, three"]


def test_parquet_is_read_also_gzipped(read, tmp_path):
    frame = pd.DataFrame({"prompt": ["one", "two"], "seed": [3.0, None], "tags": [["a"], []]})
    frame.to_parquet(tmp_path / "p.parquet")
    content = (tmp_path / "p.parquet").read_bytes()
    for entries in (read("p.parquet", content), read("p.parquet.gz", gzip.compress(content))):
        assert [entry.line for entry in entries] == [1, 2]
        assert entries[0].values == {"prompt": "one", "seed": 3.0, "tags": ["a"]}
        assert entries[1].values == {"prompt": "two", "seed": None, "tags": []}


def test_lines_are_numbered_as_an_editor_numbers_them(read):
    entries = read("p.csv", b'prompt\n"two\nlines"\n\nlast\n')
    assert [(entry.line, entry.values) for entry in entries] == [
        (2, {"prompt": "two\nlines"}),
        (4, None),
        (5, {"prompt": "last"}),
    ]
    assert [entry.line for entry in read("p.jsonl", b"\n{}\n")] == [1, 2]


def test_quotation_marks_are_literal_in_tsv(read):
    content = b'Prompt\tCategory\n"G I G G L E" painted\tWriting\na "sign"\tSigns\n'
    entries = read("PartiPrompts.tsv", content)
    assert [entry.values["Prompt"] for entry in entries] == ['"G I G G L E" painted', 'a "sign"']


def test_prompts_keep_every_byte_but_the_line_ending(read):
    content = "\ufeff a \r\n e\u0301\u00e9 \r\nlast without newline".encode()
    assert prompts(read("p.txt", content)) == [" a ", " e\u0301\u00e9 ", "last without newline"]


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("p.jsonl", b"{not json}", "the line is not JSON (Expecting property name"),
        ("p.jsonl", b"[1, 2]", "the line is not a JSON object"),
        ("p.jsonl", b'{"prompt": NaN}', "the line is not JSON (NaN is no JSON value)"),
        ("p.jsonl", b"[" * 100_000, "the line is not JSON"),
        ("p.jsonl", b'{"seed": ' + b"9" * 5000 + b"}", "the line is not JSON"),
        ("p.jsonl", b"x" * (2**20 + 1), "the line is longer than 1 MiB"),
        ("p.txt", b"x" * (2**20 + 1), "the line is longer than 1 MiB"),
        ("p.csv", b"a,b,c", "the row has 3 fields where the header names 1"),
        ("p.csv", b'"a"b', "the row is not CSV"),
        ("p.csv", b"x" * (2**20 + 1), "the line is longer than 1 MiB"),
        ("p.tsv", b"a\tb", "the row has 2 fields where the header names 1"),
    ],
)
def test_a_bad_row_does_not_stop_the_good_ones(read, name, bad, reason):
    good = b'{"prompt": "good"}' if name == "p.jsonl" else b"good"
    header = b"prompt\n" if name in ("p.csv", "p.tsv") else b""
    entries = read(name, header + b"\n".join([good, bad, good]) + b"\n")
    assert [bool(entry.values) for entry in entries] == [True, False, True]
    assert entries[1].error.startswith(reason)
    assert entries[1].line == 2 + bool(header)
    assert bad.decode().startswith(entries[1].raw)
    assert len(entries[1].raw) <= 500


@pytest.mark.parametrize(
    "bad",
    [
        b'"%s"' % (b"x" * 2**20),
        b'"short, then\n%s"' % (b"x" * 2**20),
        b'n,"%s\nmore"' % (b"x" * 2**20),
        b'"a ""quoted"" %s"' % (b'""' * 2**20),
    ],
)
def test_a_quoted_csv_field_that_is_too_long_swallows_no_other_row(read, bad):
    entries = read("p.csv", b"prompt\ngood\n" + bad + b"\ngood\n")
    assert [bool(entry.values) for entry in entries] == [True, False, True]
    assert entries[1].error == "the line is longer than 1 MiB"
    assert bad.decode().startswith(entries[1].raw)


def test_an_unclosed_quotation_mark_names_the_lines_it_swallows(read):
    (good, bad) = read("p.csv", b'prompt\ngood\n"never closed\nnext\n')
    assert good.values == {"prompt": "good"}
    assert bad.line == 3
    assert "to line 4" in bad.error


def test_a_parquet_row_that_is_not_utf8_does_not_stop_the_others(tmp_path):
    prompts_ = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts_}), tmp_path / "p.parquet")
    entries = read_file(tmp_path / "p.parquet")
    assert [bool(entry.values) for entry in entries] == [True, False, True]
    assert "cannot be read" in entries[1].error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.docx", b"", "the name must end in one of .jsonl"),
        ("prompts", b"", "the name must end in one of .jsonl"),
        ("p.csv", b"text,n\na,1\n", "has no column 'prompt', but 'text, n'; --prompt-column says"),
        ("p.tsv", b"prompt\ta\ta\nx\ty\tz\n", "names a column twice"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9999)[:-20], "is no whole gzip file"),
        ("p.jsonl.gz", b'{"prompt": "a"}', "is no whole gzip file"),
        ("p.txt", "a prompt".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("p.parquet", b"PAR1 but not really", "is no whole Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(read, name, content, message):
    with pytest.raises(InputError, match=r"^manifest ") as caught:
        read(name, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    pd.DataFrame({"prompt": ["a"] * 1000}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="no whole Parquet file"):
        read_file(path)


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_file(tmp_path / "p.csv")


def test_raw_text_of_bad_bytes_can_be_written_as_json(read):
    (entry,) = read("p.jsonl", b'{"prompt": "\xff')
    assert json.loads(json.dumps(entry.raw)).encode() == b'{"prompt": "\\udcff'
