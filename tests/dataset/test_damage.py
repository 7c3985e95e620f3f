"""Random damage to finished datasets: `verify` finds all of it, and a repair never hides any.

The images are noise, so that hundreds of repairs take seconds; tests/pipelines/test_repair.py
repairs with a model.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from making import FACTS, files, make_plan, make_shard, pixels_of

from jaxdiff import cli
from jaxdiff.dataset import ledger, names
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.errors import InputError
from pipelines import repair

ROWS = [
    {"prompt": "a red circle", "num_images": 4},
    {"prompt": "ein grüner Stern", "id": "star", "seed": 7, "note": "x"},
    {"prompt": ""},
    {"prompt": "a ring", "seeds": [5, 9]},
]
JOBS = [  # each format of shards, and of images
    {"format": "webdataset", "image_format": "png"},
    {"format": "parquet", "image_format": "jpeg"},
    {"format": "imagefolder", "image_format": "webp"},
]
FAILING = ("000000001", "000000005")
DAMAGES, SLOW_DAMAGES = 60, 300  # for each format
REPAIRS, SLOW_REPAIRS = 30, 150
SECONDS = 20  # a damaged dataset must not make anything wait


@pytest.fixture(scope="module", params=JOBS, ids=lambda job: job["format"])
def whole(request, tmp_path_factory, tiny_checkpoint) -> Path:
    """A dataset of two shards with a rejected row, failed images and a revision."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    said = {"images_per_shard": 4, "batch_size": 2} | request.param
    run = make_plan(folder / "out", folder / "rows.jsonl", tiny_checkpoint, **said)
    run.store.claim(names.DEVICE, "test")
    run.store.claim(f"{names.BATCH}/16-8-2", "4")
    make_shard(run, 0, (*FAILING, "000000002"))
    make_shard(run, 1, FAILING)
    with shards.Attempt(run, 0, revision=1) as attempt:
        fill(attempt, run, 0)
        attempt.commit(FACTS)
    ledger.finalize(run, 0.0)
    run.store.work().rmdir()  # as a job leaves it; it is empty
    counts, problems = ledger.verify(folder / "out")
    assert problems == []
    assert (counts["rejected"], counts["made"], counts["failed"]) == (1, 5, 2)
    return folder / "out"


def fill(attempt: shards.Attempt, run: Run, shard: int) -> None:
    for image in run.planned(shard):
        if image.key in FAILING:
            attempt.add_failed(image, "not finite")
        else:
            attempt.add(shards.encode(image, pixels_of(image), run.plan))


def any_file(chance: random.Random, directory: Path) -> Path:
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return chance.choice(sorted(found))


def flip(chance: random.Random, directory: Path) -> None:
    path = any_file(chance, directory)
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def insert(chance: random.Random, directory: Path) -> None:
    path = any_file(chance, directory)
    content = path.read_bytes()
    at = chance.randint(0, len(content))
    path.write_bytes(content[:at] + chance.choice([b" ", b"\n", b"\0" * 512, b"0"]) + content[at:])


def cut(chance: random.Random, directory: Path) -> None:
    path = any_file(chance, directory)
    content = path.read_bytes()
    start, end = sorted(chance.choices(range(len(content) + 1), k=2))
    path.write_bytes(content[:start] + content[end:])


def truncate(chance: random.Random, directory: Path) -> None:
    path = any_file(chance, directory)
    content = path.read_bytes()
    path.write_bytes(content[: chance.randint(0, len(content))])


def delete(chance: random.Random, directory: Path) -> None:
    any_file(chance, directory).unlink()


def delete_a_folder(chance: random.Random, directory: Path) -> None:
    folders = [path for path in sorted(directory.rglob("*")) if path.is_dir()]
    shutil.rmtree(chance.choice([path for path in folders if path.name not in ("_jaxdiff")]))


def swap(chance: random.Random, directory: Path) -> None:
    exchange(any_file(chance, directory), any_file(chance, directory))


def swap_markers(chance: random.Random, directory: Path) -> None:
    exchange(*chance.sample(sorted((directory / names.DONE).iterdir()), 2))


def exchange(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def add_a_stray(chance: random.Random, directory: Path) -> None:
    folders = ["", names.DATA, names.METADATA, names.WORK, names.PLAN, names.DONE, names.BATCH]
    name = chance.choice(["x", ".x", "train-00002.tar", "00002.json", "00000.r9.json", "old"])
    path = directory / chance.choice(folders) / name
    if name.startswith(".") and path.parent == directory:
        return  # of the user
    path.mkdir() if chance.random() < 0.3 else path.write_text("{}")


def in_place_of(chance: random.Random, directory: Path) -> None:
    """Puts a link, a pipe, a folder or a file where a file or a folder was."""
    paths = [path for path in sorted(directory.rglob("*")) if path.name != "lock"]
    path, outside = chance.choice(paths), directory.with_name("outside")
    path.rename(outside)
    kind = chance.choice(["link", "loop", "nowhere", "pipe", "folder", "file"])
    if kind in ("link", "loop", "nowhere"):
        path.symlink_to({"link": outside, "loop": path, "nowhere": "/nowhere"}[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("{}")


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said, indent=2) + "\n")


def change_a_value(chance: random.Random, said: dict | list) -> None:
    """Changes a number, a text or a key somewhere in a JSON value."""
    keys = list(said) if isinstance(said, dict) else list(range(len(said)))
    if not keys:
        return
    key = chance.choice(keys)
    value = said[key]
    if isinstance(value, dict | list) and value and chance.random() < 0.8:
        change_a_value(chance, value)
    elif chance.random() < 0.3:
        del said[key]
    elif isinstance(value, int | float) and chance.random() < 0.8:
        said[key] = value + chance.choice([1, -1, 10**6])
    else:
        said[key] = chance.choice([None, [], {}, "x", -1, True, [1], {"a": 1}])


def edit_a_document(chance: random.Random, directory: Path) -> None:
    documents = [
        *("_SUCCESS", "run.json", "croissant.json", f"{names.PLAN}/plan.json"),
        *(f"{names.DONE}/{name}.json" for name in ("00000", "00000.r1", "00001")),
    ]
    path = directory / chance.choice(documents)
    edit_json(path, lambda said: change_a_value(chance, said))


def edit_the_identity(chance: random.Random, directory: Path) -> None:
    """Changes a setting in the plan, and the plan's id with it."""

    def change(said: dict) -> None:
        change_a_value(chance, said["identity"])
        said["id"] = plans.digest(said["identity"])

    edit_json(directory / names.PLAN / "plan.json", change)


def edit_a_pin(chance: random.Random, directory: Path) -> None:
    path = chance.choice([directory / names.DEVICE, *(directory / names.BATCH).iterdir()])
    path.write_text(chance.choice(["", "8", "TPU v5e", path.read_text() + "\n"]))


def rewrite(directory: Path, shard: int, change: Callable[[list], None]) -> None:
    """Changes a shard's samples and errors, and updates every hash and count but the root's."""
    run = open_run(directory)
    marker = shards.read_marker(run, shard)
    samples, rows = shards.samples(run, marker, run.store), []
    for image in run.planned(shard):
        rows.append((image, "not finite" if image.key in FAILING else next(samples)))
    change(rows)
    with shards.Attempt(run, shard, marker.revision + 1) as attempt:
        for image, made in rows:
            if isinstance(made, str):
                attempt.add_failed(image, made)
            else:
                attempt.add(made)
        attempt.commit(marker.facts)
    forged = directory / shards.marker_name(shard, marker.revision + 1)
    edit_json(forged, lambda said: said.update(revision=marker.revision, attempt=marker.attempt))
    forged.replace(directory / shards.marker_name(shard, marker.revision))


def forge_an_image(chance: random.Random, directory: Path) -> None:
    def change(rows: list) -> None:
        number = chance.choice([n for n, (_, made) in enumerate(rows) if not isinstance(made, str)])
        image, made = rows[number]
        plan = open_run(directory).plan
        if chance.random() < 0.3:  # other bytes of the same pixels
            content = made.image + b"x"
            known = {**made.record, "sha256": hashlib.sha256(content).hexdigest()}
            rows[number] = image, replace(made, image=content, record=known)
        else:
            rows[number] = image, shards.encode(image, pixels_of(image, chance.randint(1, 9)), plan)

    rewrite(directory, chance.randrange(2), change)


def forge_a_record(chance: random.Random, directory: Path) -> None:
    def change(rows: list) -> None:
        number = chance.choice([n for n, (_, made) in enumerate(rows) if not isinstance(made, str)])
        image, made = rows[number]
        name = chance.choice(sorted(made.record.keys() - {"key"}))
        rows[number] = image, with_another(made, name)

    rewrite(directory, chance.randrange(2), change)


def with_another(sample: Sample, name: str) -> Sample:
    """Returns a sample with another value in one field of its record."""
    value = sample.record[name]
    value = value + 1 if isinstance(value, int | float) else f"{value}x"
    value = '{"note":"y"}' if name == "metadata" else value
    return replace(sample, record={**sample.record, name: value})


def forge_an_outcome(chance: random.Random, directory: Path) -> None:
    """Lets an image fail that was made, or changes the reason of one that failed."""

    def change(rows: list) -> None:
        number = chance.randrange(len(rows))
        rows[number] = rows[number][0], "another reason"

    rewrite(directory, chance.randrange(2), change)


DAMAGE = {
    **dict.fromkeys((flip, insert, cut, truncate, delete, swap), 2),
    **dict.fromkeys((delete_a_folder, swap_markers, edit_the_identity, edit_a_pin), 1),
    **dict.fromkeys((add_a_stray, forge_an_outcome), 2),
    **dict.fromkeys((in_place_of, edit_a_document, forge_an_image, forge_a_record), 4),
}


def everything(directory: Path) -> dict:
    """Returns what is at every path, without following links."""

    def at(path: Path):
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else path.is_dir()

    return {str(path): at(path) for path in directory.rglob("*") if path.name != "lock"}


def damages(whole: Path, folder: Path, seed: int, count: int):
    """Yields damaged copies of a dataset, and what was done; ends each after `SECONDS`."""
    form = open_run(whole).plan.settings.format
    chance, directory = random.Random(f"{seed} {form}"), folder / "out"
    before = None
    for _ in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, directory)
        before = before or everything(directory)
        (do,) = chance.choices(list(DAMAGE), DAMAGE.values())
        do(chance, directory)
        if everything(directory) != before:
            signal.alarm(SECONDS)
            try:
                yield directory, do.__name__
            finally:
                signal.alarm(0)
            count -= 1
        if not count:
            return


@pytest.fixture
def limited():
    """Ends what waits forever."""

    def end(*_) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.signal(signal.SIGALRM, before)


def problems(directory: Path) -> list[str]:
    try:
        return ledger.verify(directory)[1]
    except InputError as problem:
        return [str(problem)]


@pytest.mark.parametrize(
    ("seed", "count"), [(1, DAMAGES), pytest.param(2, SLOW_DAMAGES, marks=pytest.mark.slow)]
)
def test_every_damage_is_found(whole, tmp_path, limited, seed, count):
    done = Counter()
    for number, (directory, what) in enumerate(damages(whole, tmp_path / "new", seed, count)):
        try:
            found = problems(directory)
        except Exception as problem:
            raise AssertionError(f"damage {number} of seed {seed}: {what}") from problem
        assert found, f"damage {number} of seed {seed}: {what}"
        assert all("\n" not in line for line in found)
        done[what] += 1
    print(f"{count} damages found: {dict(done)}")


def test_records_are_held_against_the_plan_even_under_a_root_of_their_own(whole, tmp_path):
    """As if somebody had changed a record and then finished the dataset again."""
    run = open_run(whole)
    fields = {name for name, _ in run.plan.record_fields} - {"pixel_sha256"}  # JPEG loses pixels
    for name in sorted(fields - {"key"}):

        def change(rows: list, name: str = name) -> None:
            image, made = rows[0]
            rows[0] = image, with_another(made, name)

        directory = tmp_path / name
        shutil.copytree(whole, directory)
        rewrite(directory, 1, change)
        ledger.finalize(open_run(directory), 0.0)
        assert "image 000000004" in "\n".join(problems(directory)), name


@pytest.fixture
def quick_repairs(monkeypatch):
    """Lets `verify --repair` make noise, without a model and without Beam."""

    def make_shards(generate_shard, plan, todo: list[int], _) -> None:
        run = open_run(Path(generate_shard.directory))
        begun_on = run.store.claim(names.DEVICE, "test")
        if todo and begun_on != "test":
            raise InputError(f"{run.address} was begun on {begun_on}")
        for shard in todo:
            marker = shards.read_marker(run, shard)
            assert (marker is None) == (generate_shard.mode == "make")
            with shards.Attempt(run, shard) as attempt:
                fill(attempt, run, shard)
                attempt.commit(FACTS) if marker is None else attempt.repair(marker)

    monkeypatch.setattr(repair, "make_shards", make_shards)
    monkeypatch.setattr(repair.runners, "choose", lambda *_: None)


@pytest.mark.parametrize(
    ("seed", "count"), [(3, REPAIRS), pytest.param(4, SLOW_REPAIRS, marks=pytest.mark.slow)]
)
def test_a_repair_restores_every_byte_or_the_damage_stays_visible(
    whole, tmp_path, limited, quick_repairs, capsys, seed, count
):
    expected, ends = files(whole), Counter()
    for number, (directory, what) in enumerate(damages(whole, tmp_path / "new", seed, count)):
        where = f"damage {number} of seed {seed}: {what}"
        code = cli.main(["verify", str(directory), "--repair"])
        said = capsys.readouterr()
        assert "--debug shows where" not in said.err, f"{where}: {said.err}"
        assert (code == 0) == (problems(directory) == []), where
        if code == 0:
            assert files(directory) == expected, where
        ends["repaired" if code == 0 else "refused", what] += 1
    repaired = sum(number for (end, _), number in ends.items() if end == "repaired")
    print(f"{count} repairs, {count - repaired} refused: {dict(ends)}")
    assert repaired > count / 3
