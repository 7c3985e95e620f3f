"""The job on real Beam with a real model: what it makes, and what it rejects."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cases import further
from making import files
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset.local import LocalStore
from jaxdiff.images import image_files


def records(directory: Path) -> list[dict]:
    found = []
    for path in sorted((directory / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return found


def test_a_manifest_becomes_a_finished_dataset(tmp_path, command, capsys, tiny_checkpoint):
    directory = tmp_path / "out"
    assert cli.main(command(directory)) == 0
    said = capsys.readouterr()
    assert "24 images in" in said.out
    assert "images/s" in said.out
    assert "1 of 5 rows of" in said.err
    assert "line 3: the line is not JSON" in said.err
    assert {path.name for path in directory.iterdir()} == {
        *("data", "metadata", "_jaxdiff", "README.md", "croissant.json", "run.json"),
        *("rejected.jsonl", "failed.jsonl", "_SUCCESS"),
    }
    assert cli.main(["verify", str(directory)]) == 0
    assert "24 made" in capsys.readouterr().out

    (rejected,) = (directory / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["line"] == 3
    report = json.loads((directory / "run.json").read_text())
    stages = {"plan", "load", "compile", "generate", "encode", "write", "finalize"}
    assert set(report["seconds"]) == stages
    assert report["padded"] == 6 * 4
    assert report["devices"] == ["1 x cpu"]
    made = records(directory)
    assert [record["key"] for record in made] == [f"{index:09d}" for index in range(24)]
    assert [record["id"] for record in made[:6]] == ["0", "0", "0", "square", "3", "3"]
    assert [record["seed"] for record in made[3:6]] == [7, 5, 9]
    with tarfile.open(directory / "data" / "train-00000.tar") as tar:
        content = tar.extractfile("000000003.png").read()
    assert made[3] == {
        "key": "000000003",
        "id": "square",
        "image_index": 0,
        "prompt": "a blue square",
        "negative_prompt": "a star",
        "seed": 7,
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance_scale": 7.5,
        "sampler": "ddim",
        "tokens_lost": 0,
        "noise": "jax",
        "dtype": "float32",
        "options": "",
        "model": report["model"]["fingerprint"],
        "model_name": tiny_checkpoint.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "pixel_sha256": image_files.pixel_sha256(image_files.decode(content)),
        "metadata": {},
    }
    assert made[0]["metadata"] == {"note": "ü"}

    model = jaxdiff.load(tiny_checkpoint)
    request = jaxdiff.Request(prompt="a blue square", negative_prompt="a star", seed=7, steps=2)
    (image,) = model.generate([request], batch_size=2)
    assert (image.pixels == image_files.decode(content)).all()
    images = model.generate("a red circle", num_images=3, steps=2)  # the seeds are derived, too
    assert [image.request.seed for image in images] == [record["seed"] for record in made[:3]]
    hashes = [image_files.pixel_sha256(image.pixels) for image in images]
    assert hashes == [record["pixel_sha256"] for record in made[:3]]


def test_another_job_in_the_same_directory_is_rejected_with_the_difference(
    tmp_path, command, capsys, manifest, finish
):
    directory = tmp_path / "out"
    finish(directory, "--limit=4")
    before = files(directory)
    capsys.readouterr()
    assert cli.main(command(directory, "--limit=4", "--guidance-scale=4")) == 2
    assert "holds another run (guidance_scale 7.5 -> 4.0)" in capsys.readouterr().err
    manifest.write_text('{"prompt": "another"}\n')
    assert cli.main(command(directory, "--limit=4")) == 2
    assert "(manifest_sha256 " in capsys.readouterr().err
    assert files(directory) == before


@pytest.mark.usefixtures("noisy")
def test_overwrite_starts_over_and_keeps_foreign_files(tmp_path, command, finish):
    directory = tmp_path / "out"
    finish(directory)
    (directory / "notes.txt").write_text("mine")
    assert cli.main(command(directory, "--limit=4", "--overwrite", "--seed=1")) == 0
    assert (directory / "notes.txt").read_text() == "mine"
    assert len(records(directory)) == 4
    assert cli.main(["verify", str(directory)]) == 1  # which names it
    (directory / "notes.txt").unlink()
    assert cli.main(["verify", str(directory)]) == 0


def test_overwrite_deletes_nothing_if_the_new_input_is_invalid(tmp_path, command, finish):
    directory, bad = tmp_path / "out", tmp_path / "bad.txt"
    finish(directory, "--limit=4")
    before = files(directory)
    bad.write_text("\n")
    assert cli.main(command(directory, "--overwrite", manifest=bad)) == 2
    assert cli.main(command(directory, "--overwrite", "--strict")) == 2
    assert files(directory) == before


def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_shard(
    tmp_path, command, capsys, finish
):
    directory = tmp_path / "out"
    finish(directory, "--limit=4")
    before = files(directory)
    assert cli.main(command(directory, "--overwrite", "--mesh=data=64")) == 2
    assert files(directory) == before
    capsys.readouterr()
    assert cli.main(command(directory, "--limit=4")) == 0
    assert "is already finished" in capsys.readouterr().out


def test_a_directory_with_foreign_files_is_rejected(tmp_path, command, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"")
    for more in ([], ["--overwrite"]):
        assert cli.main(command(tmp_path / "mine", *more)) == 2
        assert "holds other files and no jaxdiff run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
    (tmp_path / "mine" / "_jaxdiff").mkdir()  # without a plan, it is still not a jaxdiff dataset
    assert cli.main(command(tmp_path / "mine", "--overwrite")) == 2
    assert (tmp_path / "mine" / "photo.jpg").exists()


def test_a_directory_that_another_job_holds_alone_is_not_overwritten(
    tmp_path, command, capsys, finish
):
    directory = tmp_path / "out"
    finish(directory, "--limit=4")
    with LocalStore(directory).held():
        assert cli.main(command(directory, "--limit=4", "--overwrite")) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert cli.main(command(directory, "--limit=4")) == 0


def test_an_output_directory_that_cannot_be_made_is_one_line(command, capsys):
    assert cli.main(command(Path("/proc/jaxdiff/out"))) == 2
    assert "--output /proc/jaxdiff/out cannot be used (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "same"),
    [
        further(["--images-per-shard=8"], True),
        (["--direct_running_mode=multi_threading", "--direct_num_workers=2"], True),
        (["--format=parquet", "--image-format=webp"], True),
        (["--seed=1"], False),
    ],
)
def test_pixels_depend_only_on_the_request(tmp_path, command, finished, more, same):
    def pixels(directory: Path) -> dict[str, str]:
        table = pq.read_table(directory / "metadata", columns=["key", "pixel_sha256"])
        return {row["key"]: row["pixel_sha256"] for row in table.to_pylist()}

    assert cli.main(command(tmp_path / "other", *more)) == 0
    assert (pixels(finished()) == pixels(tmp_path / "other")) == same


def test_images_that_are_not_finite_fail_alone(
    tmp_path, command, capsys, tiny_checkpoint, finished
):
    """Breaks the embedding of the word "star": prompts without it must not be affected."""
    broken, directory = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, broken)
    path = broken / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    vocabulary = json.loads((broken / "tokenizer" / "vocab.json").read_text())
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name][vocabulary["star</w>"]] = 3e38  # which overflows in a sum
    save_file(weights, path, {"format": "pt"})

    assert cli.main(command(directory, f"--model={broken}")) == 3
    assert "3 images could not be generated" in capsys.readouterr().out
    failed = [json.loads(line) for line in (directory / "failed.jsonl").read_text().splitlines()]
    assert [(line["key"], line["line"]) for line in failed] == [
        ("000000003", 2),  # its negative prompt has the word
        ("000000004", 4),
        ("000000005", 4),
    ]
    assert {line["reason"] for line in failed} == {"the model's values were not finite"}
    whole = {record["key"]: record["pixel_sha256"] for record in records(finished())}
    made = {record["key"]: record["pixel_sha256"] for record in records(directory)}
    assert made == {key: whole[key] for key in made}
    assert len(made) == 21
    assert cli.main(["verify", str(directory)]) == 0
    assert cli.main(command(directory, f"--model={broken}")) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strict"], "--strict: 1 of 5 rows of"),
        (["--steps=0"], "--steps must be a whole number from 1 to 100000, not '0'"),
        (["--manifest=no.csv"], "manifest no.csv does not exist"),
        (["--model=no"], "model 'no' is neither"),
        (["--mesh=data=64"], "--mesh data=64: needs 64 devices, but there are"),
        (["--runner=FlinkRuner"], "unknown --runner FlinkRuner; known runners: FnApiRunner,"),
        (["--workers=0"], "--workers must be a whole number from 1 to 1024, not '0'"),
        (["--direct_num_workers=x"], "Beam's options: argument --direct_num_workers: invalid int"),
        (["--experiments=a", "10"], "unexpected '10' (jaxdiff generate --help"),
        ([f"--manifest={'x' * 300}.txt"], f"{'x' * 300}.txt cannot be read: File name too long"),
        ([f"--model={'x' * 300}"], f"model '{'x' * 300}' cannot be read (File name too long)"),
        ([f"--output={'x' * 300}"], f"--output {'x' * 300} cannot be used (File name too long)"),
        (["--profile=/dev/null"], "--profile '/dev/null' is no folder to write to; name one"),
        ([f"--profile={'x' * 300}"], "--profile 'xxxxx"),
        (["--stpes=3"], "unknown option --stpes; did you mean --steps?"),
    ],
)
def test_invalid_input_writes_nothing(tmp_path, command, capsys, more, message):
    assert cli.main(command(tmp_path / "new" / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"jaxdiff: {message}")
    assert "while running" not in error
    assert not (tmp_path / "new").exists()
