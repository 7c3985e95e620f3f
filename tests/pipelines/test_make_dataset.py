"""Jobs from Python: the same datasets as the command's, whatever the rows come as."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import files

import jaxdiff
from jaxdiff.dataset import ledger
from jaxdiff.request import derived_seed

pytestmark = pytest.mark.usefixtures("noise_throughout")

ROWS = [
    {"prompt": f"a {color} circle", "id": color, "seeds": [3, 4, 5], "note": note}
    for color, note in (("red", "ü"), ("blue", None), ("green", "x"), ("pink", ""))
]
SAID = {"steps": 2, "batch_size": 2, "images_per_shard": 4}


@pytest.fixture
def make(tiny_checkpoint, tmp_path):
    """Returns `make_dataset` with the options of the command's tests."""

    def make(rows, output="out", **options) -> jaxdiff.MadeDataset:
        return jaxdiff.make_dataset(rows, tmp_path / output, tiny_checkpoint, **{**SAID, **options})

    return make


def shards(directory: Path) -> dict[str, bytes]:
    whole = files(directory).items()
    return {name: content for name, content in whole if name.startswith(("data/", "metadata/"))}


def records(directory: Path) -> list[dict]:
    return pq.read_table(directory / "metadata").to_pylist()


def test_rows_of_every_kind_are_the_same_job_as_the_commands(make, noise, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    of_command = noise(manifest=lines)
    made = make(ROWS)
    assert made == jaxdiff.MadeDataset(str(tmp_path / "out"), made=12, failed=0, rejected=0)
    assert made.complete
    assert shards(tmp_path / "out") == shards(of_command)
    assert ledger.verify(tmp_path / "out")[1] == []
    before = files(tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text(lines)
    kinds = [
        (row for row in ROWS),
        pd.DataFrame(ROWS),
        pa.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
        [{**row, "seeds": np.array(row["seeds"])} for row in ROWS],
        [{**row, "note": float("nan") if row["note"] is None else row["note"]} for row in ROWS],
        tmp_path / "rows.jsonl",
    ]
    assert [make(kind) for kind in kinds] == [made] * len(kinds)
    assert files(tmp_path / "out") == before


def test_prompts_and_gaps_and_indexes(make, tmp_path):
    table = pd.DataFrame({"prompt": ["a", "b", "c"], "seed": [7, None, 9], "size": [1, 2, 3]})
    table = table.sort_values("seed", ascending=False, na_position="first")
    assert make(table, "table").made == 3
    found = {record["prompt"]: record for record in records(tmp_path / "table")}
    assert (found["a"]["seed"], found["c"]["seed"]) == (7, 9)
    assert json.loads(found["c"]["metadata"]) == {"size": 3}
    assert make(["a star", "a star"], "texts", num_images=2, format="parquet").made == 4
    seeds = [derived_seed(0, str(n // 2), n % 2) for n in range(4)]
    assert [record["seed"] for record in records(tmp_path / "texts")] == seeds


def test_ctrl_c_stops_and_the_same_call_continues(make, noisy, noise, tmp_path):
    noisy("import time\nnoise.finite = lambda request: not time.sleep(0.1)")

    stopped = []

    def stop(done: int, total: int) -> None:
        if 0 < done < total and not stopped:
            stopped.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="the same call continues"):
        make(ROWS, progress=stop)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    noisy()
    assert make(ROWS).made == 12
    whole = noise(manifest="".join(json.dumps(row) + "\n" for row in ROWS))
    assert shards(tmp_path / "out") == shards(whole)


def test_a_failed_job_raises_and_the_same_call_continues(make, noisy, tmp_path):
    noisy("import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(jaxdiff.UnfinishedError, match="a worker died of SIGKILL while making no"):
        make(ROWS)
    noisy()
    assert make(ROWS).complete


def test_what_cannot_be_made_is_counted(make, noisy):
    noisy("noise.finite = lambda request: request.prompt != 'a blue circle'")
    made = make([*ROWS, {"prompt": ""}])
    assert (made.made, made.failed, made.rejected, made.complete) == (9, 3, 1, False)


def test_a_job_in_a_thread_touches_no_signals_and_is_alone(make, tmp_path):
    handlers, told, result = signal.getsignal(signal.SIGINT), [], []

    def progress(*counts: int) -> None:
        told.append(counts)
        assert signal.getsignal(signal.SIGINT) is handlers
        if len(told) == 1:
            with pytest.raises(jaxdiff.InputError, match="already making a dataset; wait for it"):
                make(ROWS, "other")
            told.append("refused")

    thread = threading.Thread(target=lambda: result.append(make(ROWS, progress=progress)))
    thread.start()
    thread.join()
    assert [each.made for each in result] == [12]
    assert told[1] == "refused"
    assert told[-1] == (12, 12)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (3, {}, "rows must be a path, a table or a list, not 3"),
        ({"prompt": "a"}, {}, "rows must be a path, a table or a list, not {"),
        (["a", 3], {}, "rows[1] must be a prompt or a mapping, not 3"),
        ([{"prompt": b"a"}], {}, "rows[0]: b'a' is not a value of JSON; convert it to text"),
        ([{"prompt": "a", "x": [float("inf")]}], {}, "rows[0]: Out of range float values"),
        (pd.DataFrame({"prompt": ["a", 3]}), {}, "rows cannot be read as a table (Expected bytes"),
        ([], {}, "manifest rows.jsonl has no rows"),
        (["", " "], {}, "none of its 2 rows can be used; line 1: the prompt is empty"),
        ("nowhere.jsonl", {}, "manifest nowhere.jsonl does not exist"),
        (ROWS, {"stesp": 2}, "make_dataset: unknown option 'stesp'; did you mean --steps?"),
        (ROWS, {"steps": 0}, "--steps must be a whole number from 1 to"),
        (ROWS, {"strict": "yes"}, "make_dataset: strict must be true or false, not 'yes'"),
        (ROWS, {"dry_run": True}, "dry_run is for the command line; leave it out"),
        (ROWS, {"beam_arguments": ["--runner=NoRunner"]}, "unknown --runner NoRunner"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_written(make, tmp_path, rows, options, message):
    with pytest.raises(jaxdiff.InputError) as caught:
        make(rows, **options)
    assert message in str(caught.value)
    left = [path for path in (tmp_path / "out").rglob("*") if path.name not in ("_jaxdiff", "lock")]
    assert left == []


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "python.md"
    monkeypatch.chdir(tmp_path)
    _, jobs = page.read_text("utf-8").split("\n## Datasets\n")
    (example,) = re.findall(r"^```python\n(.*?)^```", jobs, re.M | re.S)
    exec(compile(example, str(page), "exec"), {"__name__": "example"})
    assert ledger.verify(tmp_path / "out" / "shapes")[0]["made"] == 8
