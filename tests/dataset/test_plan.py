import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import make_plan

from jaxdiff import checks, cli
from jaxdiff.dataset import names, plan_reader
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.run import open_run
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble
from jaxdiff.request import derived_seed


@pytest.fixture
def plan(tmp_path, tiny_checkpoint):
    """Plans rows into a new directory: `plan(rows, steps=3)` returns (plan, images, rejected)."""

    def plan(rows: list[dict | str], **said):
        directory = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        made = make_plan(directory, path, tiny_checkpoint, **said)
        shards = [made.planned(shard) for shard in made.shards]
        rejected = (directory / "rejected.jsonl").read_text().splitlines()
        return made.plan, shards, [json.loads(line) for line in rejected]

    return plan


def test_images_have_keys_in_the_order_of_the_manifest(plan):
    rows = [{"prompt": "a", "num_images": 2}, {"prompt": "b", "id": "x", "n": 1}]
    _, (images,), _ = plan(rows)
    assert [(i.key, i.id, i.image_index, i.request.prompt) for i in images] == [
        ("000000000", "0", 0, "a"),
        ("000000001", "0", 1, "a"),
        ("000000002", "x", 0, "b"),
    ]
    assert images[2].metadata == '{"n":1}'
    assert images[2].line == 2


@pytest.mark.parametrize("limit", [None, 5])
def test_rows_are_the_same_in_batches_of_any_size(plan, monkeypatch, limit):
    long = "a red circle above a blue square " * 12
    rows = [{"prompt": f"{n} {long if n % 3 else ''}", "num_images": 1 + n % 2} for n in range(8)]
    rows[2:2] = ["no JSON", {"prompt": ""}]
    rows.append({"prompt": "beyond the limit", "steps": 0})
    made, *found = plan(rows, limit=limit)
    monkeypatch.setattr(plan_reader, "BATCH_SIZE", 1)
    one_by_one, *again = plan(rows, limit=limit)
    assert again == found
    assert len(found[1]) == (2 if limit else 3)
    assert {image.tokens_lost > 0 for shard in found[0] for image in shard} == {True, False}
    assert one_by_one.notices == made.notices
    assert one_by_one.sha256 == made.sha256


def test_an_error_is_raised_after_the_rows_before_it(tmp_path, tiny_checkpoint):
    path, rows = tmp_path / "rows.jsonl.gz", [{"prompt": "a", "id": "x"}]
    path.write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    run = make_plan(tmp_path / "out", path, tiny_checkpoint)
    rows = [{"prompt": "b", "id": "x"}, *({"prompt": f"{n} {n**9}"} for n in range(9999))]
    whole = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="changes image 0 of row 'x', which is already planned"):
        make_plan(tmp_path / "out", path, tiny_checkpoint, extended=run)
    with pytest.raises(InputError, match="not a complete gzip file"):
        make_plan(tmp_path / "new", path, tiny_checkpoint)


def test_a_derived_seed_depends_on_the_id_and_not_on_the_position(plan):
    a, b = {"prompt": "a", "id": "a", "num_images": 2}, {"prompt": "b", "id": "b"}
    _, (first,), _ = plan([a, b])
    _, (second,), _ = plan([b, a])
    seeds = {(i.id, i.image_index): i.request.seed for i in first}
    assert seeds == {(i.id, i.image_index): i.request.seed for i in second}
    assert len(set(seeds.values())) == 3
    # sha256("0|a|0") begins with these four bytes.
    assert seeds["a", 0] == derived_seed(0, "a", 0) == 0x699BA3D2
    _, (third,), _ = plan([a, b], seed=1)
    assert seeds != {(i.id, i.image_index): i.request.seed for i in third}


def test_the_seeds_of_a_row_are_used(plan):
    _, (images,), _ = plan(
        [{"prompt": "a", "seed": 5, "num_images": 2}, {"prompt": "b", "seeds": [9]}]
    )
    assert [i.request.seed for i in images] == [5, 6, 9]


def test_a_shard_holds_one_bucket_and_full_batches(plan):
    sizes = [16, 16, 32, 16, 32, 16, 16, 16]
    rows = [{"prompt": str(n), "width": width} for n, width in enumerate(sizes)]
    made, shards, _ = plan(rows, batch_size=2, images_per_shard=5)
    assert [[i.request.prompt for i in shard] for shard in shards] == [
        ["0", "1", "3", "5"],
        ["2", "4"],
        ["6", "7"],
    ]
    assert made.shard_sizes == [4, 2, 2]


def test_images_without_guidance_have_their_own_bucket(plan):
    rows = [{"prompt": "a", "guidance_scale": w} for w in (0, 1, 1.5, 7)]
    assert plan(rows)[0].shard_sizes == [2, 2]


def test_shards_are_smaller_where_images_are_larger_than_512(plan):
    row = {"prompt": "a", "num_images": 2100}
    assert plan([row], width=512, height=512)[0].shard_sizes == [960, 960, 180]
    assert plan([row], width=1024, height=1024)[0].shard_sizes == [256] * 8 + [52]
    assert plan([row], width=1024, height=1024, images_per_shard=3)[0].shard_sizes[0] == 8


def test_limit_takes_the_first_images_and_reads_no_further(plan):
    rows = [{"prompt": "a", "num_images": 3}, {"prompt": "b", "num_images": 3}, "broken"]
    made, (images,), rejected = plan(rows, limit=4)
    assert [i.request.prompt for i in images] == ["a", "a", "a", "b"]
    assert made.rows == {"blank": 0, "rejected": 0, "accepted": 2}
    assert rejected == []


def test_a_bad_row_is_listed_and_the_others_are_planned(plan, tmp_path):
    rows = [{"prompt": "a", "id": "x"}, "{broken", "", {"prompt": "b", "id": "x"}, {"prompt": "c"}]
    made, (images,), rejected = plan(rows)
    assert [i.id for i in images] == ["x", "3"]  # the number of the fourth row that is not blank
    assert made.rows == {"blank": 1, "rejected": 2, "accepted": 2}
    assert rejected[0]["file"] == str(tmp_path / "rows.jsonl")
    assert rejected[0]["line"] == 2
    assert rejected[0]["raw"] == "{broken"
    assert rejected[0]["reason"].startswith("the line is not JSON")
    assert rejected[1]["line"] == 4
    assert rejected[1]["reason"] == "id 'x' is already used on line 1"


def test_a_row_number_that_repeats_an_id_is_explained(plan):
    _, _, (rejected,) = plan([{"prompt": "a", "id": 1.0}, {"prompt": "b"}])
    assert rejected["reason"] == (
        "id '1' (the row's number from 0, which is its default id) is already used on line 1"
    )


def test_images_too_small_for_the_noise_of_torch_are_rejected(plan):
    rows = [{"prompt": "a", "width": 8, "height": 8}, {"prompt": "b", "width": 16, "height": 16}]
    _, (images,), (rejected,) = plan(rows, noise="torch")
    assert rejected["reason"].startswith("8x8 has 4 latent values; --noise torch needs at least 16")
    assert [image.request.prompt for image in images] == ["b"]
    assert plan(rows)[0].rows["rejected"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([""], "has no rows"),
        (["x", {"prompt": ""}], "none of its 2 rows can be used; line 1: the line is not JSON"),
    ],
)
def test_a_manifest_without_a_good_row_is_rejected(plan, rows, message):
    with pytest.raises(InputError, match=message):
        plan(rows)


def test_binary_garbage_is_rejected_with_any_ending(tmp_path, tiny_checkpoint):
    for name in ("p.jsonl", "p.csv", "p.txt"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
        with pytest.raises(InputError, match=r"none of its \d+ rows|no column 'prompt'"):
            make_plan(tmp_path / f"out-{name}", tmp_path / name, tiny_checkpoint)


def test_equal_input_plans_equal_bytes(plan, tmp_path):
    rows = [{"prompt": "a"}, "broken", {"prompt": "b", "width": 24}]
    first, _, _ = plan(rows)
    second, _, _ = plan(rows)
    assert first == second
    other, _, _ = plan(rows, steps=21)
    assert other.id != first.id
    assert plans.differences(first.identity, other.identity) == "steps 50 -> 21"


def test_row_groups_contain_whole_shards_in_order(tmp_path, tiny_checkpoint):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "num_images": 9001}\n')
    made = make_plan(tmp_path / "out", path, tiny_checkpoint, images_per_shard=1000)
    file = pq.ParquetFile(made.store.path(f"{names.PLAN}/{made.plan.images_file}"))
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sizes == [5000, 4001]
    assert made.plan.shard_sizes == [*[1000] * 9, 1]
    keys = [i.key for n in range(10) for i in made.planned(n)]
    assert keys == [f"{index:09d}" for index in range(9001)]
    assert open_run(tmp_path / "out") == made


def test_a_damaged_plan_is_rejected(tmp_path, manifest, tiny_checkpoint):
    make_plan(tmp_path / "out", manifest, tiny_checkpoint)
    path = tmp_path / "out" / "_jaxdiff" / "plan" / "plan.json"
    whole = path.read_text()
    for damaged in ("", "[]", "{}", whole.replace('"steps": 50', '"steps": 51')):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"plan\.json cannot be used .* --overwrite"):
            open_run(tmp_path / "out")


def test_a_plan_of_another_version_is_rejected(tmp_path, manifest, tiny_checkpoint, capsys):
    make_plan(tmp_path / "out", manifest, tiny_checkpoint)
    path = tmp_path / "out" / "_jaxdiff" / "plan" / "plan.json"
    older = json.loads(path.read_text())
    older["identity"]["plan_version"] = 1
    del older["identity"]["eta"], older["model_name"]
    path.write_text(json.dumps(older))
    assert cli.main(["verify", str(tmp_path / "out")]) == 2
    assert "(it was written by another version of jaxdiff)" in capsys.readouterr().err


def test_planning_and_verifying_import_no_jax(tmp_path, manifest, tiny_checkpoint):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(os.path.dirname(os.path.dirname(__file__)))!r})
from jaxdiff.dataset import ledger, shard
from jaxdiff.images import image_files
from jaxdiff.dataset.finished import card
from pipelines import generate_options
from making import make_plan, make_shard
out = Path({str(tmp_path / "out")!r})
run = make_plan(out, Path({str(manifest)!r}), Path({str(tiny_checkpoint)!r}))
make_shard(run, 0)
ledger.finalize(run, 0.0)
counts, problems = ledger.verify(out)
assert counts["made"] == 9 and not problems
heavy = {{"jax", "flax", "torch", "apache_beam"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"steps": "0"}, "--steps must be a whole number from 1 to 100000, not '0'"),
        ({"steps": 1001}, "steps must be at most 1000 for ddim, not 1001"),
        ({"width": "100"}, "--width must be a multiple of 8 for this model, not 100"),
        ({"batch_size": 0}, "--batch-size must be a whole number from 1"),
        ({"guidance_scale": "x"}, "--guidance-scale must be a number from 0 to 1000"),
        ({"sampler": "plms"}, "--sampler must be one of ddim, ddpm, pndm, euler"),
        ({"format": "zip"}, "--format must be one of webdataset, parquet"),
        ({"image_format": "gif"}, "--image-format must be one of png, webp, jpeg"),
        ({"noise": "numpy"}, "--noise must be one of jax, torch"),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16"),
        ({"eta": "2"}, "--eta must be a number from 0 to 1, not '2'"),
        ({"clip_skip": -1}, "--clip-skip must be a whole number from 0"),
        ({"prompt_chunks": 0}, "--prompt-chunks must be a whole number from 1"),
        ({"deep_cache": 0}, "--deep-cache must be a whole number from 1"),
        ({"scheduler": "karras"}, '--scheduler must have the form "key=value, key=value"'),
        ({"scheduler": {"use_karras_sigmas": [1]}}, '--scheduler must have the form "key=value'),
        ({"seed": -1}, "--seed must be a whole number from 0"),
        ({"limit": 0}, "--limit must be a whole number from 1"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(tiny_checkpoint, said, message):
    with pytest.raises(InputError) as caught:
        job_settings.resolve(said, open_ensemble(tiny_checkpoint))
    assert str(caught.value).startswith(message)


def test_a_sampler_that_does_not_fit_the_refiner_is_rejected(tiny_checkpoint, tmp_path):
    refiner = tmp_path / "refiner"
    shutil.copytree(tiny_checkpoint, refiner)
    path = refiner / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    model = open_ensemble(tiny_checkpoint, refiner=refiner)
    assert job_settings.resolve({"sampler": "ddim"}, model).sampler == "ddim"
    with pytest.raises(InputError, match='prediction_type = "sample" is not supported by pndm'):
        job_settings.resolve({"sampler": "pndm"}, model)


def test_defaults_come_from_the_model(tiny_checkpoint):
    settings = job_settings.resolve({"height": "32"}, open_ensemble(tiny_checkpoint))
    assert (settings.width, settings.height, settings.sampler) == (64, 32, "ddim")
    assert (settings.steps, settings.guidance_scale) == (50, 7.5)
    bundled = job_settings.resolve({}, open_ensemble("shapes64"))
    assert (bundled.steps, bundled.guidance_scale) == (20, 1.5)


@pytest.mark.parametrize(
    "said",
    [
        "use_karras_sigmas=true,timestep_spacing=trailing",
        " timestep_spacing = trailing , use_karras_sigmas = true",
        {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
    ],
)
def test_scheduler_changes_are_normalised(tiny_checkpoint, said):
    settings = job_settings.resolve({"scheduler": said}, open_ensemble(tiny_checkpoint))
    assert settings.scheduler == "timestep_spacing=trailing, use_karras_sigmas=true"
    changes = checks.key_values(settings.scheduler)
    assert changes == {"use_karras_sigmas": True, "timestep_spacing": "trailing"}


def test_a_changed_scheduler_value_is_no_longer_a_default():
    config = {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing", "x"]}
    changed = scheduler_config.changed(config, "timestep_spacing=trailing")
    assert changed == {"timestep_spacing": "trailing", "_use_default_values": ["x"]}


@pytest.mark.parametrize(
    ("row", "said", "reason"),
    [
        ({"sampler": "unipc"}, {"scheduler": "lower_order_final=false"}, "unipc divides by zero"),
        ({"sampler": "lcm", "steps": 60}, {}, "steps must be at most 50 for lcm, not 60"),
        ({"sampler": "pndm"}, {"scheduler": "prediction_type=sample"}, "is not supported by pndm"),
    ],
    ids=str,
)
def test_a_row_that_its_sampler_cannot_handle_is_rejected_alone(plan, row, said, reason):
    rows = [{"prompt": "a", "sampler": "euler"}, {"prompt": "b", **row}]
    made, _, rejected = plan(rows, sampler="euler", **said)
    assert made.images == 1
    assert [entry["line"] for entry in rejected] == [2]
    assert reason in rejected[0]["reason"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"eta": 0.5, "sampler": "euler"}, "--eta only affects the sampler ddim"),
        ({"refiner_start": 0.5}, "--refiner-start has no effect without --refiner"),
        ({"guidance_start": 0.8, "guidance_stop": 0.2}, "must be less than --guidance-stop 0.2"),
        ({"scheduler": "use_karras_sigmas=true"}, "use_karras_sigmas=true has no effect on ddim"),
        ({"scheduler": "shift=3", "sampler": "euler"}, "shift=3 has no effect on euler"),
        (
            {"scheduler": "algorithm_type=sde-dpmsolver++", "sampler": "dpmpp_2m"},
            "use --sampler dpmpp_2m or dpmpp_2m_sde",
        ),
    ],
    ids=str,
)
def test_an_option_without_effect_is_rejected(plan, said, message):
    with pytest.raises(InputError, match=message):
        plan([{"prompt": "a"}], **said)
    plan([{"prompt": "a", "sampler": "ddim"}], eta=0.5, sampler="euler")


def test_a_record_lists_the_non_default_options(plan):
    usual, _, _ = plan([{"prompt": "a"}])
    assert usual.options == ""
    other, _, _ = plan([{"prompt": "a"}], eta=0.5, clip_skip=1, scheduler={"steps_offset": 3})
    assert other.options == "eta=0.5, clip_skip=1, steps_offset=3"
