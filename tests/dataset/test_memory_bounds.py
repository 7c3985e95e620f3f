"""A manifest is planned, or refused, within 1 GB of memory, whatever it contains."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import further

TESTS = Path(__file__).parents[1]
# Plans each manifest in a fork of its own, whose peak of memory is its own, too.
PLANNER = f"""
import os
import sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from making import make_plan, open_ensemble
from jaxdiff.errors import InputError
open_ensemble(Path(sys.argv[1]))  # imports all
for manifest in sys.stdin:
    if os.fork():
        os.wait()
        continue
    path = Path(manifest.rstrip())
    try:
        said = f"{{make_plan(path.parent / 'out', path, Path(sys.argv[1])).plan.images}} images"
    except InputError as problem:
        said = str(problem)
    kib = next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line)
    print(kib, said, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def planned(tiny_checkpoint):
    """Returns a function that plans a manifest; it returns the KiB of memory and what was said."""

    def planned(path: Path) -> tuple[int, str]:
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        kib, _, said = process.stdout.readline().partition(" ")
        return int(kib), said

    command = [sys.executable, "-c", PLANNER, tiny_checkpoint]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        yield planned
        process.stdin.close()


def endless_quotes(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'prompt,b\n"')
        for _ in range(100):
            file.write(b'"",' * 700_000 + b"\n")


def long_row_of_many_images(path: Path) -> None:
    path.write_text(json.dumps({"prompt": "a", "num_images": 1500, "x": "y" * 1_000_000}))


def long_column_names(path: Path) -> None:
    rows = ({"prompt": "a", f"{row}{'k' * 900_000}": 1} for row in range(300))
    path.write_text("\n".join(map(json.dumps, rows)))


def one_text_for_all_rows(path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), ["x" * 20_000_000])
    table = pa.table({"prompt": ["a"] * 256, "text": text})
    options = {"dictionary_pagesize_limit": 2**30, "store_schema": False}
    pq.write_table(table, path, compression="zstd", **options)
    assert path.stat().st_size < 2000


def a_list_of_sixteen_million(path: Path) -> None:
    values = pa.array([[1] * 16_000_000], pa.list_(pa.int8()))
    pq.write_table(pa.table({"prompt": ["a"], "values": values}), path, compression="zstd")
    assert path.stat().st_size < 2000


def packed_texts(path: Path) -> None:
    texts = ["x" * 3_000_000 + str(row) for row in range(256)]
    pq.write_table(pa.table({"prompt": texts}), path, compression="zstd", use_dictionary=False)


def tiny_json_values(path: Path) -> None:
    path.write_text("[" + "{}," * 2**24 + "{}]")


CASES = [
    (endless_quotes, "p.csv.gz", "none of its"),
    (long_row_of_many_images, "p.jsonl", "1500 images"),
    (long_column_names, "p.jsonl", "a column name of 900001 characters; at most 500"),
    (one_text_for_all_rows, "p.parquet", "the row has 20000017 bytes; at most 1048576"),
    (a_list_of_sixteen_million, "p.parquet", "bytes; at most 1048576"),
    (packed_texts, "p.parquet", "packed in"),
    further(tiny_json_values, "p.json", "has more than 1000000 rows that cannot be used"),
]


@pytest.mark.parametrize(("write", "name", "message"), CASES)
def test_any_manifest_is_planned_or_refused_within_1_gb(tmp_path, planned, write, name, message):
    path = tmp_path / name
    write(path)
    kib, said = planned(path)
    assert message in said
    assert kib < 10**9 / 1024


def test_rows_of_parquet_with_long_texts_are_read_as_they_are(tmp_path):
    from jaxdiff.dataset.manifest import manifest as manifests

    path = tmp_path / "p.parquet"
    texts = [None, "x" * 900_000, "y" * 1_100_000, *map(str, range(600))]
    lists = [None, ["ab"] * 3, [], *[["c", None]] * 600]
    struct = [{"n": 1, "m": [("k", "v")]}] * 603
    kind = pa.struct({"n": pa.int32(), "m": pa.map_(pa.string(), pa.string())})
    columns = {"prompt": texts, "tags": lists, "s": pa.array(struct, kind)}
    pq.write_table(pa.table(columns), path)
    (source,) = manifests.find(path).sources
    entries = list(manifests.read(source))
    assert [entry.line for entry in entries] == list(range(1, 604))
    assert entries[1].values == {"prompt": "x" * 900_000, "tags": ["ab"] * 3, "s": struct[0]}
    assert re.fullmatch("the row has 11000[0-9]{2} bytes; at most 1048576", entries[2].error)
    assert [entry.values["prompt"] for entry in entries[3:]] == texts[3:]
    assert [entry.values["tags"] for entry in entries[3:]] == lists[3:]
