"""The good rows of any manifest are planned; the bad ones are listed with a reason."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import make_plan

from jaxdiff.dataset import planning
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble

GOOD = b'{"prompt": "a red circle"}'


@pytest.fixture
def planned(tmp_path, tiny_checkpoint):
    """Plans a manifest of bytes: `planned("x.csv", b"...")` returns (ids, rejected)."""

    def planned(where: str | Path, content: bytes | None = None, **said):
        if content is not None:
            (tmp_path / where).write_bytes(content)
        run = make_plan(tmp_path / "out", tmp_path / where, tiny_checkpoint, **said)
        shards = run.shards
        images = [i for n in shards for i in run.planned(n)]
        assert all(image.key.isdecimal() for image in images)
        rejected = (tmp_path / "out" / "rejected.jsonl").read_bytes().splitlines()
        assert run.plan.rows["accepted"] == len(images)
        assert run.plan.rows["rejected"] == len(rejected)
        return [image.id for image in images], [json.loads(line) for line in rejected]

    return planned


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"prompt": "%s"}' % (b"x" * (2**20 - 20)), "prompt has 1048556 characters; at most"),
        (b'{"prompt": "%s"}' % (b"x" * 2**20), "the line is longer than 1 MiB"),
        (b'{"prompt": "a\\u0000b"}', "prompt contains a NUL character"),
        (b'{"prompt": "a\0b"}', "the line is not JSON (Invalid control character at char"),
        (b'{"prompt": "\\ud800"}', "prompt contains the lone surrogate U+D800"),
        (b'{"prompt": "\xff"}', "prompt contains the byte 0xff, which is not UTF-8"),
        (b'{"prompt": "gr\xfcn"}', "prompt contains the byte 0xfc, which is not UTF-8"),
        (b'{"prompt": "a", "note": "\xfc"}', "an extra column contains the byte"),
        (b'{"prompt": "a", "\\ud800": 1}', "an extra column contains the lone"),
        (b"[" * 100_000, "the line is not JSON"),
        (b'{"prompt": "a", "x": %s1%s}' % (b"[" * 50_000, b"]" * 50_000), "the line is not JSON"),
        (b'{"prompt": "a", "guidance_scale": Infinity}', "the line is not JSON (Infinity is no"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale must be a number from 0 to"),
        (b'{"prompt": "a", "guidance_scale": "inf"}', "guidance_scale must be a number from 0 to"),
        (b'{"prompt": "a", "seed": {"a": 1}}', "seed must be a whole number from 0"),
        (b'{"prompt": ["a"]}', "prompt must be text, not ['a']"),
        (b'{"prompt": "a", "id": {"a": 1}}', "id must be text, not {'a': 1}"),
        (b'{"prompt": "a", "width": "wide"}', "width must be a whole number from 8"),
        (b'{"prompt": "a", "sampler": 8}', "sampler must be one of"),
        (b'{"text": "a"}', "the row has no column 'prompt', only 'text'; name the column of"),
        (b"\x89PNG\r", "the line is not JSON"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_bad_row_is_named_and_the_good_ones_are_planned(planned, tmp_path, bad, reason):
    ids, (rejected,) = planned("p.jsonl", b"\n".join([GOOD, bad, GOOD]))
    assert ids == ["0", "2"]
    assert (rejected["file"], rejected["line"]) == (str(tmp_path / "p.jsonl"), 2)
    assert rejected["reason"].startswith(reason)
    assert len(json.dumps(rejected)) < 8000


def test_ids_are_never_paths(planned, tmp_path):
    ids = ["../../etc/passwd", "/etc", "a/b", "a\\b", "..", ".", "CON", "a", "A", "a\nb", "\u202e"]
    lines = [json.dumps({"prompt": "x", "id": each}).encode() for each in ids]
    before = set(tmp_path.parent.iterdir())
    assert planned("p.jsonl", b"\n".join(lines)) == (ids, [])
    assert set(tmp_path.parent.iterdir()) == before


def test_the_second_row_with_an_id_is_rejected(planned, tmp_path):
    (tmp_path / "a.csv").write_text("id,prompt\nx,one\nx,two\n")
    (tmp_path / "b.csv").write_text("id,prompt\ny,three\nx,four\n")
    ids, rejected = planned("*.csv")
    assert ids == ["x", "y"]
    a, b = str(tmp_path / "a.csv"), str(tmp_path / "b.csv")
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in rejected] == [
        (a, 3, "id 'x' is already used on line 2"),
        (b, 3, f"id 'x' is already used on line 2 of {a}"),
    ]


def test_rows_without_an_id_are_numbered_across_files(planned, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three\n")
    ids, _ = planned("*.txt")
    assert ids == ["0", "1", "2"]
    run = open_run(tmp_path / "out")
    images = run.planned(0)
    names = [Path(image.source).name for image in images]
    assert list(zip(names, [image.line for image in images], strict=True)) == [
        ("a.txt", 1),
        ("a.txt", 3),
        ("b.txt", 1),
    ]


def test_ten_thousand_bad_rows_give_a_one_line_error(planned, tmp_path):
    with pytest.raises(InputError) as caught:
        planned("p.jsonl", b'{"prompt": ""}\n' * 10_000)
    message = str(caught.value)
    assert "none of its 10000 rows can be used; line 1: the prompt is empty" in message
    assert len(message) < 500
    assert "\n" not in message


def test_ten_thousand_bad_rows_with_a_good_one_are_all_listed(planned):
    ids, rejected = planned("p.jsonl", b'{"prompt": ""}\n' * 10_000 + GOOD)
    assert ids == ["10000"]
    assert [entry["line"] for entry in rejected] == list(range(1, 10_001))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "txt", "parquet"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_binary_garbage_gives_a_one_line_error_with_any_ending(planned, ending, gzipped):
    garbage = np.random.default_rng(0).bytes(5000)
    with pytest.raises(InputError, match=r"^manifest ") as caught:
        planned(f"p.{ending}{'.gz' * gzipped}", gzip.compress(garbage) if gzipped else garbage)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_truncated_gzip_file_is_rejected(planned):
    with pytest.raises(InputError, match="not a complete gzip file"):
        planned("p.jsonl.gz", gzip.compress((GOOD + b"\n") * 999)[:-9])


def test_a_manifest_that_changes_while_it_is_read_is_rejected(tmp_path, tiny_checkpoint):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n")
    model = open_ensemble(tiny_checkpoint)
    settings = job_settings.resolve({}, model)
    found = manifests.find(path)
    identity = planning.identify(found, settings, model)
    path.write_text("a blue circle\n")
    with pytest.raises(InputError, match=r"p\.txt changed while it was read; run the command"):
        planning.make(found, settings, model, identity, tmp_path / "plan", models={})


def test_a_plan_outlives_its_manifest(planned, tmp_path):
    planned("p.jsonl", GOOD)
    run = open_run(tmp_path / "out")
    (tmp_path / "p.jsonl").unlink()
    (image,) = run.planned(0)
    assert image.request.prompt == "a red circle"


def test_shards_do_not_depend_on_the_path_of_the_manifest(tmp_path, tiny_checkpoint):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.jsonl").write_bytes(GOOD)
        made.append(
            make_plan(tmp_path / f"{name}-out", tmp_path / name / "p.jsonl", tiny_checkpoint)
        )
    assert made[0].plan.id == made[1].plan.id
    assert made[0].plan.shard_ids == made[1].plan.shard_ids


def test_shards_of_a_few_images_share_row_groups(tmp_path, tiny_checkpoint):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(10_000)))
    run = make_plan(tmp_path / "out", path, tiny_checkpoint, images_per_shard=8)
    file = tmp_path / "out" / "_jaxdiff" / "plan" / run.plan.images_file
    assert (len(run.shards), pq.ParquetFile(file).num_row_groups) == (1250, 3)
    assert [i.key for i in run.planned(1249)] == [f"{key:09d}" for key in range(9992, 10_000)]
