"""Runs the same command again: after a crash, a full disk or a signal, or when it is finished."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from cases import further
from injected import in_noise_at
from making import files

from jaxdiff import cli
from jaxdiff.dataset import names
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError
from pipelines import worker
from pipelines.worker import Task

pytestmark = pytest.mark.usefixtures("noisy")


@pytest.fixture
def finished(noise):
    return noise


@pytest.fixture
def environment(noisy) -> dict[str, str]:
    return dict(os.environ)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def on_terminal(arguments: list[str], environment: dict[str, str]):
    """Runs a command whose stderr is a terminal; yields the process and its output there."""
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


def test_a_finished_job_does_not_run_again(tmp_path, command, capsys):
    directory = tmp_path / "out"
    cli.main(command(directory, "--limit=1"))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}
    assert "1 image in 1 shard\n" in capsys.readouterr().err
    assert cli.main(command(directory, "--limit=1")) == 0
    assert "is already finished: 1 image\n" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}


@pytest.mark.parametrize("number", [signal.SIGKILL, further(signal.SIGTERM)])
def test_an_interrupted_job_continues_to_the_same_bytes(
    tmp_path, command, capsys, noisy, finished, number
):
    directory = tmp_path / "out"
    noisy(in_noise_at("", "import time; time.sleep(0.1)"))  # so that it can be interrupted
    environment = dict(os.environ)
    arguments = [sys.executable, "-m", "jaxdiff", *command(directory, "--num-images=40")]
    with on_terminal(arguments, environment) as (process, output):
        wait_for(lambda: (directory / names.DONE / "00001.json").exists(), process)
        process.send_signal(number)
        assert process.wait() == (75 if number == signal.SIGTERM else -number)
    said = b"".join(output).decode()
    assert re.search(r"\d+%\|.*\| \d+/63 images", said)
    if number == signal.SIGTERM:
        assert "stopped; run the same command to continue" in said
    assert not (directory / "_SUCCESS").exists()
    assert cli.main(["verify", str(directory)]) == 1
    kept = sorted((directory / names.DONE).iterdir())
    marked = {path: path.read_bytes() for path in kept}

    noisy()
    assert cli.main(command(directory, "--num-images=40")) == 0
    assert f"{len(kept)} of them already made" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == marked
    assert files(directory) == files(finished("--num-images=40"))


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    tmp_path, command, capsys, environment
):
    directory = tmp_path / "out"

    job = [sys.executable, "-m", "jaxdiff", *command(directory)]
    # Limits files to 20 KiB, to simulate a disk that gets full in the middle of a shard.
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *job]
    ended = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"jaxdiff: {directory}: File too large; fix this, then run the same command again"
    )
    assert not list((directory / names.TMP).iterdir())
    assert cli.main(command(directory)) == 0
    assert cli.main(["verify", str(directory)]) == 0


def test_a_full_disk_during_planning_leaves_no_files(tmp_path, command, environment):
    directory = tmp_path / "out"
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-m", "jaxdiff"]
    ended = subprocess.run(
        [*limited, *command(directory)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"jaxdiff: {directory}: ")
    assert said.endswith("File too large; fix this, then run the same command again")
    assert not directory.exists()


def test_a_model_that_changed_after_planning_is_rejected(tmp_path, finish, tiny_checkpoint):
    directory = tmp_path / "out"
    finish(directory, "--limit=4")
    run = open_run(directory)
    shutil.rmtree(directory / names.DONE)
    changed = run.plan.identity | {"model": "0" * 64}
    body = json.loads((directory / names.PLAN / "plan.json").read_text())
    body |= {"identity": changed, "id": plans.digest(changed)}
    (directory / names.PLAN / "plan.json").write_text(json.dumps(body))
    images = open_run(directory).plan.images_file
    os.rename(directory / names.PLAN / run.plan.images_file, directory / names.PLAN / images)
    with pytest.raises(InputError, match="is not the one that the job was planned"):
        worker.make_shard(Task(str(directory), {"model": str(tiny_checkpoint)}, 0), lambda _: None)
    assert shards.read_marker(open_run(directory), 0) is None


def test_strict_applies_to_an_existing_plan(tmp_path, command, capsys, finish):
    directory = tmp_path / "out"
    finish(directory)
    assert cli.main(command(directory, "--strict")) == 2
    assert "--strict: 1 of 5 rows of" in capsys.readouterr().err


def test_a_finished_job_restores_what_was_deleted(tmp_path, command, capsys, finish):
    directory = tmp_path / "out"
    finish(directory)
    before = files(directory)
    (directory / "README.md").unlink()
    assert cli.main(command(directory)) == 0
    assert files(directory) == before
    (directory / "data" / "train-00001.tar").unlink()
    capsys.readouterr()
    assert cli.main(command(directory)) == 1
    assert "train-00001.tar is missing; run `jaxdiff verify" in capsys.readouterr().err
    (directory / names.DONE / "00001.json").unlink()
    assert cli.main(command(directory)) == 0
    assert files(directory) == before


def test_another_kind_of_device_cannot_continue_a_job(tmp_path, command, capsys, finish):
    directory = tmp_path / "out"
    finish(directory)
    (directory / "_SUCCESS").unlink()  # as if it had been interrupted
    (directory / names.DEVICE).write_text("TPU v5e")
    (directory / names.DONE / "00001.json").unlink()
    capsys.readouterr()
    assert cli.main(command(directory)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was begun on TPU v5e, but this is cpu, " in error
    assert not (directory / "_SUCCESS").exists()


def test_a_changed_plan_is_rejected(tmp_path, command, capsys, finish):
    directory = tmp_path / "out"
    finish(directory)
    (directory / names.DONE / "00001.json").unlink()
    (path,) = (directory / names.PLAN).glob("images-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert cli.main(command(directory)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{path.name} has changed since the job was planned; this cannot be repaired" in said


def test_the_same_command_continues_even_with_overwrite(tmp_path, command, capsys, finish):
    directory = tmp_path / "out"
    finish(directory, "--limit=4")
    anew = command(directory, "--seed=1", "--overwrite")
    cli.main(anew)
    (directory / "_SUCCESS").unlink()  # as if it had been interrupted
    (directory / names.DONE / "00002.json").unlink()
    capsys.readouterr()
    assert cli.main(anew) == 0
    assert "24 images in 6 shards, 5 of them already made" in capsys.readouterr().err
    assert cli.main(anew) == 0  # it was finished, so this command starts over
    assert "24 images in 6 shards\n" in capsys.readouterr().err
