"""The job on real Beam with a real model: what it leaves, and what a crash leaves."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import images
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from pipelines import progress, worker
from pipelines.options import Models

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": "a red circle", "num_images": 3, "note": "ü"},
    {"prompt": "a blue square", "id": "square", "seed": 7, "negative_prompt": "a star"},
    {"prompt": "a star", "seeds": [5, 9], "guidance_scale": 3},
    {"prompt": "two rings", "num_images": 18},
]


@pytest.fixture
def manifest(tmp_path) -> Path:
    """24 images, and a row that cannot be used."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n", "utf-8")
    return path


@pytest.fixture
def command(manifest, tiny_checkpoint):
    """The arguments of a job of six shards, two batches each: `command(directory, ...)`."""

    def command(output: Path, *more: str, manifest: Path = manifest) -> list[str]:
        said = {"manifest": manifest, "output": output, "model": tiny_checkpoint}
        said |= {"steps": 2, "batch-size": 2, "images-per-shard": 4}
        return ["generate", *(f"--{name}={value}" for name, value in said.items()), *more]

    return command


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """For jobs in processes of their own: the compiled program is shared between them."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def files(directory: Path) -> dict[str, bytes]:
    """The dataset's files, without the report that has a clock in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name != "run.json"
        and path.parent.name != "done"
        and path.name != "lock"
    }


def records(directory: Path) -> list[dict]:
    found = []
    for path in sorted((directory / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return found


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def on_terminal(arguments: list[str], environment: dict[str, str]):
    """Runs a command whose stderr is a terminal; gives the process and what it writes there."""
    terminal, stderr = pty.openpty()
    output = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while content := os.read(terminal, 4096):
                output.append(content)

    with subprocess.Popen(arguments, env=environment, stderr=stderr) as process:
        os.close(stderr)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield process, output
        finally:
            process.kill()
            reader.join()
            os.close(terminal)


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
    assert set(report["seconds"]) == {"plan", "load", "generate", "finalize"}
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
        "noise": "jax",
        "dtype": "float32",
        "options": "",
        "model": report["model"]["fingerprint"],
        "sha256": plans.hashlib.sha256(content).hexdigest(),
        "pixel_sha256": images.pixel_sha256(images.decode(content)),
        "metadata": {},
    }
    assert made[0]["metadata"] == {"note": "ü"}

    model = jaxdiff.load(tiny_checkpoint)
    request = jaxdiff.Request(prompt="a blue square", negative_prompt="a star", seed=7, steps=2)
    (image,) = model.generate([request], batch_size=2)
    assert (image.pixels == images.decode(content)).all()


def test_a_finished_job_is_not_run_again(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory, "--limit=4"))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}
    capsys.readouterr()
    assert cli.main(command(directory, "--limit=4")) == 0
    assert "is finished already: 4 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}


def test_another_job_in_the_same_directory_is_refused_with_the_difference(
    tmp_path, command, capsys, manifest
):
    directory = tmp_path / "out"
    cli.main(command(directory, "--limit=4"))
    before = files(directory)
    capsys.readouterr()
    assert cli.main(command(directory, "--limit=4", "--guidance-scale=4")) == 2
    assert "holds another run (guidance_scale 7.5 -> 4.0)" in capsys.readouterr().err
    manifest.write_text('{"prompt": "another"}\n')
    assert cli.main(command(directory, "--limit=4")) == 2
    assert "(manifest_sha256 " in capsys.readouterr().err
    assert files(directory) == before


def test_overwrite_starts_anew_and_keeps_what_is_not_ours(tmp_path, command):
    directory = tmp_path / "out"
    cli.main(command(directory))
    (directory / "notes.txt").write_text("mine")
    assert cli.main(command(directory, "--limit=4", "--overwrite", "--seed=1")) == 0
    assert (directory / "notes.txt").read_text() == "mine"
    assert len(records(directory)) == 4
    assert cli.main(["verify", str(directory)]) == 0


def test_overwrite_deletes_nothing_when_the_new_input_cannot_be_used(tmp_path, command, capsys):
    directory, bad = tmp_path / "out", tmp_path / "bad.txt"
    cli.main(command(directory, "--limit=4"))
    before = files(directory)
    bad.write_text("\n")
    assert cli.main(command(directory, "--overwrite", manifest=bad)) == 2
    assert cli.main(command(directory, "--overwrite", "--strict")) == 2
    assert files(directory) == before


def test_overwrite_keeps_the_old_run_until_the_new_one_has_a_shard(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory, "--limit=4"))
    before = files(directory)
    assert cli.main(command(directory, "--overwrite", "--mesh=data=64")) == 2
    assert files(directory) == before
    capsys.readouterr()
    assert cli.main(command(directory, "--limit=4")) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_directory_of_somebody_else_is_refused(tmp_path, command, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"")
    for more in ([], ["--overwrite"]):
        assert cli.main(command(tmp_path / "mine", *more)) == 2
        assert "holds other files and no jaxdiff run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
    (tmp_path / "mine" / "_jaxdiff").mkdir()  # no plan in it: still not ours
    assert cli.main(command(tmp_path / "mine", "--overwrite")) == 2
    assert (tmp_path / "mine" / "photo.jpg").exists()


def test_a_second_job_in_the_same_directory_is_refused(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory, "--limit=4"))
    with layout.held(directory):
        assert cli.main(command(directory, "--limit=4")) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert cli.main(command(directory, "--limit=4")) == 0


def test_an_output_directory_that_cannot_be_made_is_one_line(command, capsys):
    assert cli.main(command(Path("/proc/jaxdiff/out"))) == 1
    assert capsys.readouterr().err.startswith("jaxdiff: /proc/jaxdiff")


@pytest.mark.parametrize(
    ("more", "same"),
    [
        (["--images-per-shard=8"], True),
        (["--direct_running_mode=multi_threading", "--direct_num_workers=2"], True),
        (["--format=parquet", "--image-format=webp"], True),
        (["--seed=1"], False),
    ],
)
def test_pixels_depend_on_the_request_alone(tmp_path, command, more, same):
    def pixels(directory: Path) -> dict[str, str]:
        table = pq.read_table(directory / "metadata", columns=["key", "pixel_sha256"])
        return {row["key"]: row["pixel_sha256"] for row in table.to_pylist()}

    assert cli.main(command(tmp_path / "one")) == 0
    assert cli.main(command(tmp_path / "other", *more)) == 0
    assert (pixels(tmp_path / "one") == pixels(tmp_path / "other")) == same


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_job_continues_to_the_same_bytes(
    tmp_path, command, capsys, environment, number
):
    directory = tmp_path / "out"
    arguments = [sys.executable, "-m", "jaxdiff", *command(directory, "--num-images=40")]
    with on_terminal(arguments, environment) as (process, output):
        wait_for(lambda: (directory / layout.DONE / "00001.json").exists(), process)
        process.send_signal(number)
        assert process.wait() == (75 if number == signal.SIGTERM else -number)
    said = b"".join(output).decode()
    assert re.search(r"\d+%\|.*\| \d+/63 images", said)
    if number == signal.SIGTERM:
        assert "stopped; the same command continues" in said
    assert not (directory / "_SUCCESS").exists()
    assert cli.main(["verify", str(directory)]) == 1
    kept = sorted((directory / layout.DONE).iterdir())
    marked = {path: path.read_bytes() for path in kept}

    assert cli.main(command(directory, "--num-images=40")) == 0
    assert f"{len(kept)} of them made already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == marked
    assert cli.main(command(tmp_path / "whole", "--num-images=40")) == 0
    assert files(directory) == files(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    tmp_path, command, capsys, environment
):
    directory = tmp_path / "out"

    job = [sys.executable, "-m", "jaxdiff", *command(directory)]
    # Files end after 20 KiB, as they would on a full disk: in the middle of a shard.
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *job]
    ended = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"jaxdiff: {directory}: File too large; when that is mended, the same command continues"
    )
    assert not list((directory / layout.TMP).iterdir())
    assert cli.main(command(directory)) == 0
    assert cli.main(["verify", str(directory)]) == 0


def test_a_disk_that_is_full_at_planning_leaves_nothing(tmp_path, command, environment):
    directory = tmp_path / "out"
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-m", "jaxdiff"]
    ended = subprocess.run(
        [*limited, *command(directory)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"jaxdiff: {directory}: ")
    assert said.endswith("File too large; when that is mended, the same command continues")
    assert not directory.exists()


def test_progress_is_told_in_the_middle_of_a_shard(tmp_path, command, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    assert cli.main(command(tmp_path / "out", "--num-images=80", "--images-per-shard=200")) == 0
    lines = capsys.readouterr().err.splitlines()
    told = [
        re.fullmatch(r"jaxdiff: (\d+)/103 images(, [\d.]+ images/s, [\d:]+ left)?", line)
        for line in lines
    ]
    counts = [int(match[1]) for match in told if match]
    assert counts == sorted(counts)
    assert any(0 < count < 103 for count in counts)
    assert any(match[2] for match in told if match)


def test_progress_passes_over_files_with_odd_names(tmp_path, command):
    directory = tmp_path / "out"
    cli.main(command(directory))
    counter = progress.Counter(directory, plans.load(directory))
    (directory / layout.TMP).mkdir()
    for name in (f"{layout.DONE}/x.json", f"{layout.DONE}/99999.json", f"{layout.TMP}/x.progress"):
        (directory / name).write_text("")
    assert counter.count() == 24


def test_images_that_are_not_finite_fail_alone(tmp_path, command, capsys, tiny_checkpoint):
    """The model's word "star" is broken: prompts without it must not notice."""
    broken, directory = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, broken)
    path = broken / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    vocabulary = json.loads((broken / "tokenizer" / "vocab.json").read_text())
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name][vocabulary["star</w>"]] = np.inf
    save_file(weights, path, {"format": "pt"})

    assert cli.main(command(tmp_path / "whole", "--negative-prompt=")) == 0
    assert cli.main(command(directory, f"--model={broken}")) == 3
    assert "3 images could not be made" in capsys.readouterr().out
    failed = [json.loads(line) for line in (directory / "failed.jsonl").read_text().splitlines()]
    assert [(line["key"], line["line"]) for line in failed] == [
        ("000000003", 2),  # its negative prompt has the word
        ("000000004", 4),
        ("000000005", 4),
    ]
    assert {line["reason"] for line in failed} == {"the model's values were not finite"}
    whole = {record["key"]: record["pixel_sha256"] for record in records(tmp_path / "whole")}
    made = {record["key"]: record["pixel_sha256"] for record in records(directory)}
    assert made == {key: whole[key] for key in made}
    assert len(made) == 21
    assert cli.main(["verify", str(directory)]) == 0
    assert cli.main(command(directory, f"--model={broken}")) == 3


def test_a_model_that_changes_between_plan_and_work_is_refused(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory, "--limit=4"))
    plan = plans.load(directory)
    shutil.rmtree(directory / layout.DONE)
    changed = plan.identity | {"model": "0" * 64}
    body = json.loads((directory / layout.PLAN / "plan.json").read_text())
    body |= {"identity": changed, "id": plans.digest(changed)}
    (directory / layout.PLAN / "plan.json").write_text(json.dumps(body))
    model = command(directory)[3].removeprefix("--model=")
    with pytest.raises(jaxdiff.errors.InputError, match="is not the one that the job was planned"):
        worker.make_shard(directory, Models(model), 0)
    assert shards.read_marker(directory, plans.load(directory), 0) is None


def test_strict_holds_for_a_plan_that_is_there_already(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory, "--num-images=1"))
    assert cli.main(command(directory, "--num-images=1", "--strict")) == 2
    assert "--strict: 1 of 5 rows of" in capsys.readouterr().err


def test_a_finished_job_restores_what_was_deleted(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory))
    before = files(directory)
    (directory / "README.md").unlink()
    assert cli.main(command(directory)) == 0
    assert files(directory) == before
    (directory / "data" / "train-00001.tar").unlink()
    capsys.readouterr()
    assert cli.main(command(directory)) == 1
    assert "delete _jaxdiff/done/00001.json, and the same" in capsys.readouterr().err
    (directory / layout.DONE / "00001.json").unlink()
    assert cli.main(command(directory)) == 0
    assert files(directory) == before


def test_another_kind_of_device_does_not_continue_a_job(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory))
    for path in (directory / layout.DONE).iterdir():
        path.write_text(path.read_text().replace("1 x cpu", "4 x TPU v5e"))
    (directory / layout.DONE / "00001.json").unlink()
    capsys.readouterr()
    assert cli.main(command(directory)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was begun on 4 x TPU v5e, but here is 1 x cpu: continue on the same" in error
    assert not (directory / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strict"], "--strict: 1 of 5 rows of"),
        (["--steps=0"], "--steps must be a whole number from 1 to 100000, not '0'"),
        (["--manifest=no.csv"], "manifest no.csv does not exist"),
        (["--model=no"], "model 'no' is neither"),
        (["--mesh=data=64"], "--mesh data=64: needs 64 devices, but there are"),
        (["--runner=FlinkRuner"], "--runner FlinkRuner: Unexpected pipeline runner"),
        (["--direct_num_workers=x"], "Beam's options: argument --direct_num_workers: invalid int"),
        (["--experiments=a", "10"], "unexpected '10' (jaxdiff generate --help"),
        ([f"--manifest={'x' * 300}.txt"], f"{'x' * 300}.txt cannot be read: File name too long"),
        ([f"--model={'x' * 300}"], f"{'x' * 300} cannot be read: File name too long"),
        (["--stpes=3"], "unknown option --stpes; did you mean --steps?"),
    ],
)
def test_input_that_cannot_be_used_writes_nothing(tmp_path, command, capsys, more, message):
    assert cli.main(command(tmp_path / "new" / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"jaxdiff: {message}")
    assert "while running" not in error
    assert not (tmp_path / "new").exists()
