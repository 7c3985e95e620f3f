import datetime
import decimal
import gzip
import hashlib
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.readers import Entry
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
def test_every_text_format_is_read_plain_and_gzipped(read, name):
    assert prompts(read(name, FILES[name])) == ["one", "two, three"]
    assert prompts(read(f"{name}.gz", gzip.compress(FILES[name]))) == ["one", "two, three"]


def test_parquet_is_read_plain_and_gzipped(read, tmp_path):
    frame = pd.DataFrame({"prompt": ["one", "two"], "seed": [3.0, None], "tags": [["a"], []]})
    frame.to_parquet(tmp_path / "p.parquet")
    content = (tmp_path / "p.parquet").read_bytes()
    for entries in (read("p.parquet", content), read("p.parquet.gz", gzip.compress(content))):
        assert [entry.line for entry in entries] == [1, 2]
        assert entries[0].values == {"prompt": "one", "seed": 3.0, "tags": ["a"]}
        assert entries[1].values == {"prompt": "two", "seed": None, "tags": []}


def test_lines_are_numbered_as_in_an_editor(read):
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b"one\rtwo\r\rthree\r"),
        ("p.txt", b"one\r\ntwo\n\nthree"),
        ("p.csv", b'prompt,note\rone,x\rtwo,"a\rb"\r\rthree,y'),
        ("p.tsv", b"prompt\tnote\rone\tx\rtwo\ty\r\rthree\tz"),
    ],
)
def test_lines_may_end_in_cr_alone(read, name, content):
    entries = read(name, content)
    assert [e.values["prompt"] for e in entries if e.values] == ["one", "two", "three"]
    assert not any(e.error for e in entries)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", b'{"prompt": "a", "seed": 1, "seed": 2}\n{"prompt": "b"}\n'),
        ("p.jsonl", b'{"prompt": "a", "x": {"y": 1, "y": 1}}\n{"prompt": "b"}\n'),
    ],
)
def test_a_row_with_a_key_twice_is_rejected_alone(read, name, content):
    first, second = read(name, content)
    assert "appears twice" in first.error
    assert first.values is None
    assert second.values == {"prompt": "b"}


def test_prompts_keep_every_byte_but_the_line_ending(read):
    content = "\ufeff a \r\n e\u0301\u00e9 \r\nlast without newline".encode()
    assert prompts(read("p.txt", content)) == [" a ", " e\u0301\u00e9 ", "last without newline"]


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("p.jsonl", b"{not json}", "the line is not JSON (Expecting property name"),
        ("p.jsonl", b"[1, 2]", "the line is not a JSON object"),
        ("p.jsonl", b'{"prompt": NaN}', "the line is not JSON (NaN is not a JSON value)"),
        ("p.jsonl", b"[" * 100_000, "the line is not JSON"),
        ("p.jsonl", b'{"seed": ' + b"9" * 5000 + b"}", "the line is not JSON"),
        ("p.jsonl", b"x" * (2**20 + 1), "the line is longer than 1 MiB"),
        ("p.txt", b"x" * (2**20 + 1), "the line is longer than 1 MiB"),
        ("p.csv", b"a,b,c", "the row has 3 fields, but the header has 1"),
        ("p.csv", b'"a"b', "the row is not CSV"),
        ("p.csv", b"x" * (2**20 + 1), "the line is longer than 1 MiB"),
        ("p.tsv", b"a\tb", "the row has 2 fields, but the header has 1"),
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
def test_an_overlong_quoted_csv_field_does_not_swallow_other_rows(read, bad):
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
        ("p.csv", b"prompt;n\na;1\n", "has one column, 'prompt;n': it is separated by semicolons"),
        ("p.csv", b"text,n\na,1\n", "has no column 'prompt', only 'text, n'; name the column"),
        ("p.tsv", b"prompt\ta\ta\nx\ty\tz\n", "names a column twice"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 9999, mtime=0)[:-20],
            "is not a complete gzip file",
        ),
        ("p.jsonl.gz", b'{"prompt": "a"}', "is not a complete gzip file"),
        ("p.txt", "a prompt".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("p.parquet", b"PAR1 but not really", "is not a complete Parquet file"),
    ],
)
def test_an_unreadable_file_gives_a_one_line_error(read, name, content, message):
    with pytest.raises(InputError, match=r"^manifest ") as caught:
        read(name, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_rejected(tmp_path):
    path = tmp_path / "p.parquet"
    pd.DataFrame({"prompt": ["a"] * 1000}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="not a complete Parquet file"):
        read_file(path)


def test_a_missing_manifest_is_rejected(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_file(tmp_path / "p.csv")


def test_raw_text_of_bad_bytes_can_be_written_as_json(read):
    (entry,) = read("p.jsonl", b'{"prompt": "\xff')
    assert json.loads(json.dumps(entry.raw)).encode() == b'{"prompt": "\\udcff'


def test_a_json_list_contains_prompts_or_rows(read):
    content = json.dumps(["one", {"prompt": "two", "n": 1}, 3, None, "f\udcffur"]).encode()
    for entries in (read("p.json", content), read("p.json.gz", gzip.compress(content))):
        assert prompts(entries) == ["one", "two", "f\udcffur"]
        assert [entry.line for entry in entries] == [1, 2, 3, 4, 5]
        assert entries[2].error == entries[3].error == "the item is neither text nor a JSON object"
        assert (entries[1].values["n"], entries[2].raw) == (1, "3")
        assert json.loads(json.dumps(entries[1].raw)) == '{"prompt": "two", "n": 1}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON list"),
        (b'["a" "b"]', "is not JSON (after item 1"),
        (b'["a"] x', "is not JSON (after item 1"),
        (b'["a", ]', "is not JSON (Expecting value in item 2)"),
        (b'["a"', "is not JSON (after item 1"),
        (b'["a", NaN]', "is not JSON (NaN is not a JSON value in item 2)"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
        (b'{"prompt": "a"}', "is not a JSON list; use .jsonl for one object per line"),
        (b'["' + b"x" * 2**26 + b'"]', "is not JSON (more than 1 MiB, or no JSON, in item 1)"),
        ('["a"]'.encode("utf-16"), "is UTF-16"),
    ],
)
def test_an_invalid_json_list_gives_a_one_line_error(read, content, message):
    with pytest.raises(InputError, match=r"^manifest .*p\.json") as caught:
        read("p.json", content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_texts_has_one_prompt_per_file_in_name_order(tmp_path):
    files = {"COCOval2014": "a bird\r\n", "10": "two\nlines\n\n", "2": "\ufeff a cat", "3": ""}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    (tmp_path / "9.txt").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "README.md").write_text("no prompt")
    (tmp_path / "more.txt").mkdir()
    found = manifests.find(tmp_path)
    entries = [entry for source in found.sources for entry in manifests.read(source)]
    assert [entry.values for entry in entries] == [
        {"id": "10", "prompt": "two\nlines\n"},
        {"id": "2", "prompt": " a cat"},
        {"id": "3", "prompt": ""},
        None,
        {"id": "COCOval2014", "prompt": "a bird"},
    ]
    assert entries[3].error == "the file is longer than 1 MiB"
    assert len(entries[3].raw) == 500
    assert manifests.kinds(found) == "item"


def test_a_glob_reads_its_files_in_name_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.jsonl", "deep/c.txt"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')

    def names(pattern: str) -> list[str]:
        found = manifests.find(tmp_path / pattern)
        return [source.name.removeprefix(f"{tmp_path}/") for source in found.sources]

    assert names("*.txt") == ["b.txt"]
    assert names("[ab].*") == ["a.jsonl", "b.txt"]
    assert names("**/*.txt") == ["b.txt", "deep/c.txt"]
    assert manifests.kinds(manifests.find(tmp_path / "[ab].*")) == "jsonl, txt"
    (tmp_path / "[b].txt").write_text("a\n")  # a file with exactly this name takes precedence
    assert names("[b].txt") == ["[b].txt"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("*.csv", "matches no file"),
        ("no.csv", "does not exist"),
        ("empty", "is a folder without .txt files"),
        ("*", "photo.gif: the name must end in one of"),
    ],
)
def test_an_invalid_manifest_path_gives_a_one_line_error(tmp_path, where, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "photo.gif").write_bytes(b"")
    with pytest.raises(InputError, match=r"^manifest ") as caught:
        manifests.find(tmp_path / where)
    assert message in str(caught.value)


def test_the_digest_depends_on_every_name_and_byte(tmp_path):
    def digest(files: dict[str, str], where: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return manifests.digest(manifests.find(folder / where))

    assert digest({"a.txt": "x"}, "a.txt") == hashlib.sha256(b"x").hexdigest()
    assert digest({"a.txt": "x"}, "a.txt") == digest({"b.txt": "x"}, "b.txt")
    several = {"a.txt": "x", "b.txt": "y"}
    assert digest(several, "*.txt") == digest(several, "*.txt")
    others = [several | {"b.txt": "z"}, {"a.txt": "x", "c.txt": "y"}, {"a.txt": "y", "b.txt": "x"}]
    digests = {digest(files, "*.txt") for files in [several, *others]}
    assert len(digests) == 4
    assert digest({"a.txt": "x"}, ".") != digest({"b.txt": "x"}, ".")  # the name is the prompt's id


def test_the_prompt_column_may_be_given(read):
    table = b"caption,prompt\na cat,\n"
    (entry,) = read("p.csv", table, prompt_column="caption")
    assert entry.values == {"caption": "a cat", "prompt": ""}  # kept unchanged
    with pytest.raises(InputError, match=r"has no column 'Caption', only 'caption, prompt'"):
        read("p.csv", table, prompt_column="Caption")
    for name, content in (("p.txt", b"a cat\n"), ("p.json", b'["a cat"]')):
        (entry,) = read(name, content, prompt_column="caption")
        assert entry.values == {"caption": "a cat"}


def test_parquet_dates_and_decimals_become_text(tmp_path):
    moment = datetime.datetime(2022, 8, 11, 1, 2, 3, tzinfo=datetime.UTC)
    columns = {
        "prompt": pa.array(["a"]),
        "timestamp": pa.array([moment], pa.timestamp("ms", "UTC")),
        "day": pa.array([moment.date()]),
        "price": pa.array([decimal.Decimal("1.50")]),
        "none": pa.array([None], pa.timestamp("us")),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    (entry,) = read_file(tmp_path / "p.parquet")
    assert entry.values == {
        "prompt": "a",
        "timestamp": "2022-08-11 01:02:03.000Z",
        "day": "2022-08-11",
        "price": "1.50",
        "none": None,
    }


def test_a_file_in_two_encodings_loses_only_the_rows_that_are_not_utf8(read):
    lines = ["ein grüner Stern", "a ring"]
    content = "\n".join(lines).encode() + b"\n" + "ein grüner Kreis\n".encode("latin-1")
    entries = read("p.txt", b"\xef\xbb\xbf" + content)
    assert prompts(entries)[:2] == lines
    assert "\udcfc" in prompts(entries)[2]  # RowParser rejects it later


MEASURE = """
import sys
from jaxdiff.dataset.manifest import manifest as manifests
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
(source,) = manifests.find(sys.argv[1]).sources
before = peak()
count = sum(1 for _ in manifests.read(source))
print(count, (peak() - before) // 1024)
"""


def measure(path) -> tuple[int, int]:
    """Reads a manifest in a separate process; returns its row count and the MiB it used."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, mib = said.split()
    return int(count), int(mib)


def test_a_gzip_bomb_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(bytes(2**20))  # one line of 300 MiB
        file.write(b'\n{"prompt": "a"}\n')
    assert path.stat().st_size < 2 * 2**20
    count, mib = measure(path)
    assert count == 2
    assert mib < 50


def test_a_parquet_file_with_one_huge_row_group_is_read_in_pieces(tmp_path):
    random, path = np.random.default_rng(0), tmp_path / "p.parquet"
    prompts = pa.array([random.bytes(1000).hex() for _ in range(60_000)])
    pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=len(prompts))
    assert pq.ParquetFile(path).num_row_groups == 1
    assert path.stat().st_size > 100 * 2**20
    count, mib = measure(path)
    assert count == len(prompts)
    assert mib < 95
