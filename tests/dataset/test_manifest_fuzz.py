"""Damaged manifests are refused on one line, or planned without losing a row.

Files of every form are made from random rows, then damaged. Nothing but InputError may come out,
the counts must add up, rows that were left alone must be planned, and nothing may be written
outside the output.
"""

import csv
import gzip
import io
import json
import random
import time
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdiff.dataset import names, planning
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.families.opening import open_ensemble

FORMS = ("jsonl", "json", "csv", "tsv", "txt", "parquet")
LINES = ("jsonl", "tsv", "txt")  # whose rows are lines
NAMES = (
    *("seed", "seeds", "num_images", "width", "height", "steps", "guidance_scale", "sampler"),
    *("id", "negative_prompt", " Seed", "cfg", "Prompt", "note", "", "=1+1", "../x", "\x1b[2J"),
)
VALUES = (
    *(0, 1, -1, 7.0, 0.5, 1e308, 10**40, 2**63, True, False, None, "", " ", "3", "0x10", "1e3"),
    *("euler", "ddim", "nan", "../../etc/passwd", "=HYPERLINK(1)", "\x1b]0;x\x07", "\u202e", "\0"),
    *(
        "\ud800",
        "x" * 5000,
        "😀" * 90,
        [],
        [1, 2],
        ["a"],
        {},
        {"a": {"b": []}},
        "a\nb",
        'a"b',
        "a,b",
    ),
)
BYTES = (
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"'", b"{", b"[", b"\\"),
    *(b",", b"\t", b"\r", b"\n", b"\r\n", b"\x0b", b"\x85", b"NaN", b"1e999", b"\\ud800", b'""'),
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> Ensemble:
    return open_ensemble(tiny_checkpoint)


class Case:
    """A manifest of random rows, damaged or not.

    Attributes:
      name: of its file.
      content: the file's bytes.
      untouched: the prompts of rows that must be planned.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        form = self._random.choice(FORMS)
        good = [{"prompt": f"prompt {n} of {seed}"} for n in range(self._random.randint(1, 6))]
        rows = [row if self._random.random() < 0.5 else self._spoilt(row) for row in good]
        self.untouched = {row["prompt"] for row in rows if row in good}
        content = getattr(self, f"_{form}")(rows)
        damages = self._random.choice((0, 0, 1, 3))
        if damages and form in LINES and self._random.random() < 0.7:
            content = self._damaged_lines(content, damages, header=form == "tsv")
        elif damages:
            self.untouched = set()
            for _ in range(damages):
                content = self._damaged(content, BYTES)
        self.name = f"p.{form}"
        if self._random.random() < 0.2:
            self.name, content = f"{self.name}.gz", gzip.compress(content)
            if self._random.random() < 0.3:
                self.untouched = set()
                content = self._damaged(content, BYTES)
        self.content = content

    def _spoilt(self, row: dict) -> dict:
        picked = self._random.choices(NAMES, k=self._random.randint(1, 3))
        spoilt = row | {name: self._random.choice(VALUES) for name in picked}
        if spoilt.get("id") in (0, 1, 7, True, False, "3"):  # the default id of another row
            del spoilt["id"]
        return spoilt

    def _damaged(self, content: bytes, inserts: tuple[bytes, ...]) -> bytes:
        start = self._random.randint(0, len(content))
        end = min(len(content), start + self._random.choice((0, 1, 4, 1000)))
        new = self._random.choice((b"", self._random.choice(inserts), content[start:end] * 2))
        return content[:start] + new + content[end:]

    def _damaged_lines(self, content: bytes, damages: int, *, header: bool) -> bytes:
        """Damages lines within their ends; of the others, the rows must be planned."""
        lines = content.splitlines(keepends=True)
        inserts = tuple(each for each in BYTES if not set(each) & set(b"\r\n"))
        for _ in range(damages):
            place = self._random.randint(int(header), len(lines) - 1)
            line = lines[place].removesuffix(b"\n")
            self.untouched -= {text for text in self.untouched if text.encode() in line}
            lines[place] = self._damaged(line, inserts) + b"\n"
        return b"".join(lines)

    def _jsonl(self, rows: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    def _json(self, rows: list[dict]) -> bytes:
        return json.dumps(rows).encode()

    def _table(self, rows: list[dict], **dialect) -> bytes:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n", **dialect)
        table.writerow(columns)
        table.writerows([row.get(name) for name in columns] for row in rows)
        return file.getvalue().encode("utf-8", "surrogatepass")

    def _csv(self, rows: list[dict]) -> bytes:
        self._lose_if_ragged(rows)
        return self._table(rows)

    def _tsv(self, rows: list[dict]) -> bytes:
        self._lose_if_ragged(rows)
        rows = [{str(name): str(value) for name, value in row.items()} for row in rows]
        rows = [{n: " ".join(v.split()) for n, v in row.items()} for row in rows]
        return self._table(rows, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)

    def _lose_if_ragged(self, rows: list[dict]) -> None:
        """A table has the same columns in all rows: a strange one may refuse the whole file."""
        if any(len(row) > 1 for row in rows):
            self.untouched = set()

    def _txt(self, rows: list[dict]) -> bytes:
        return "".join(f"{row['prompt']}\n" for row in rows).encode()

    def _parquet(self, rows: list[dict]) -> bytes:
        self._lose_if_ragged(rows)
        columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
        arrays = {}
        for name, values in columns.items():
            try:
                arrays[name] = pa.array(values)
                pq.write_table(pa.table({name: arrays[name]}), io.BytesIO())
            except (pa.ArrowException, OverflowError, UnicodeError):
                arrays[name] = pa.array([ascii(value) for value in values])
        sink = io.BytesIO()
        compression = self._random.choice(("zstd", "none"))
        pq.write_table(pa.table(arrays), sink, compression=compression)
        return sink.getvalue()


def check(case: Case, folder, model: Ensemble) -> str:
    """Plans a manifest and checks what comes out; returns what happened."""
    (folder / case.name).write_bytes(case.content)
    found = manifests.find(folder / case.name)
    out = folder / "out"
    run, message = attempt(plan, found, out, model)
    if run is None:
        assert "\n" not in message
        assert case.untouched == set()
        assert sorted(path.name for path in folder.iterdir()) == [case.name]
        return "refused"
    assert sorted(path.name for path in folder.iterdir()) == sorted([case.name, "out"])
    images = [image for shard in run.shards for image in run.planned(shard)]
    rejected = (out / names.REJECTED).read_text("utf-8").splitlines()
    entries = list(manifests.read(found.sources[0]))
    counts = run.plan.rows
    assert len(entries) == sum(counts.values())
    assert len(rejected) == counts["rejected"]
    assert len({image.id for image in images}) == counts["accepted"]
    assert {image.request.prompt for image in images} >= case.untouched
    return "planned, with rejected rows" if rejected else "planned"


def attempt(function: Callable, *arguments) -> tuple:
    """Returns its result and "", or None and the message of an InputError."""
    try:
        return function(*arguments), ""
    except InputError as problem:
        return None, str(problem)


def plan(found: Manifest, out, model: Ensemble) -> runs.Run:
    """Plans a manifest as `generate` does."""
    settings = job_settings.resolve({"width": 16, "height": 8}, model)
    store = LocalStore(out)
    with store.held():
        identity = planning.identify(found, settings, model)
        folder = store.scratch("plan")
        try:
            planning.make(found, settings, model, identity, folder, models={"model": "tiny"})
            return runs.begin(folder, store)
        finally:
            if folder.exists():
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()


def fuzz(tmp_path, model: Ensemble, seeds: range) -> dict[str, int]:
    outcomes: dict[str, int] = {}
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        began = time.monotonic()
        try:
            outcome = check(Case(seed), folder, model)
        except BaseException as problem:
            problem.add_note(f"the case of seed {seed}, in {folder}")
            raise
        assert time.monotonic() - began < 60, f"seed {seed} hangs"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def test_damaged_manifests_are_refused_or_planned_without_losing_a_row(tmp_path, model):
    outcomes = fuzz(tmp_path, model, range(480))
    assert min(outcomes.values()) > 40  # each outcome is reached often
    assert len(outcomes) == 3


@pytest.mark.slow
def test_many_more_damaged_manifests(tmp_path, model):
    assert sum(fuzz(tmp_path, model, range(10_000, 11_500)).values()) == 1500
