"""Workers that fail, die or hang: only the image that causes it is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cases import further
from injected import at, in_noise_at
from making import files
from safetensors.numpy import load_file, save_file

from jaxdiff import cli
from jaxdiff.dataset import names

STAR_KEYS = ["000000003", "000000004", "000000005"]


@pytest.fixture(scope="session")
def whole(finished) -> Path:
    return finished()


def failures(directory: Path) -> dict[str, str]:
    lines = (directory / "failed.jsonl").read_text().splitlines()
    return {line["key"]: line["reason"] for line in map(json.loads, lines)}


def pixels(directory: Path) -> dict[str, str | None]:
    rows = pq.read_table(directory / "metadata").to_pylist()
    return {row["key"]: row["pixel_sha256"] for row in rows}


def children() -> list[int]:
    """Returns the process ids of this process's workers."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "pipelines.worker"], capture_output=True, text=True
    )
    return [int(line) for line in found.stdout.split()]


def test_only_rows_that_make_the_model_fail_are_lost_until_retried(
    tmp_path, command, faulty, capsys, whole
):
    directory = tmp_path / "out"
    faulty(at("star", 'raise RuntimeError("no stars\\nat all")'))
    assert cli.main(command(directory)) == 3
    assert failures(directory) == dict.fromkeys(STAR_KEYS, "RuntimeError: no stars")
    assert cli.main(["verify", str(directory)]) == 0
    assert "images: 21 of 24 made, 3 failed" in capsys.readouterr().out

    assert cli.main(command(directory, "--retry-failed")) == 3  # they still fail
    faulty(None)
    assert cli.main(command(directory)) == 3  # they are not retried
    assert cli.main(command(directory, "--retry-failed")) == 0
    assert failures(directory) == {}
    assert files(directory) == files(whole)
    assert cli.main(["verify", str(directory)]) == 0
    assert cli.main(command(directory, "--retry-failed")) == 0
    assert "is already finished: 24 images" in capsys.readouterr().out


def test_a_prompt_that_cannot_be_encoded_ahead_is_lost_alone(
    tmp_path, command, faulty, whole, capfd
):
    faulty(at("star", 'raise RuntimeError("no stars")'))
    directory = tmp_path / "out"
    assert cli.main(command(directory, "--text-encoders=unload", "--images-per-shard=24")) == 3
    assert "--text-encoders unload saves nothing on a CPU" in capfd.readouterr().err
    assert failures(directory) == dict.fromkeys(STAR_KEYS, "RuntimeError: no stars")
    assert pixels(directory) == pixels(whole) | dict.fromkeys(STAR_KEYS)
    assert cli.main(["verify", str(directory)]) == 0


def test_a_model_that_fails_on_every_image_blames_no_row(tmp_path, command, faulty, capsys):
    faulty(at("", 'raise RuntimeError("broken")'))
    assert cli.main(command(tmp_path / "out")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "jaxdiff: the model fails on every image: RuntimeError: broken"
    assert not (tmp_path / "out").exists()


def broken(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint, with finite weights that make every image overflow."""
    copy = Path(shutil.copytree(checkpoint, folder / "broken"))
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"][:] = 3e38
    weights["decoder.conv_out.weight"][:] = 3e38
    save_file(weights, path, {"format": "pt"})
    return copy


def test_a_model_without_finite_values_blames_no_row(tmp_path, command, capsys, tiny_checkpoint):
    model = broken(tiny_checkpoint, tmp_path)
    assert cli.main(command(tmp_path / "out", f"--model={model}")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "jaxdiff: the model's values for an empty prompt of 64x64 are not finite in float32, so "
        "no row is to blame; start over in another directory with another model"
    )
    assert not (tmp_path / "out").exists()


def test_without_finite_values_in_bfloat16_float32_is_recommended(tmp_path, command, noisy, capsys):
    noisy("noise.finite = lambda request: False")
    assert cli.main(command(tmp_path / "out", "--dtype=bfloat16")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "are not finite in bfloat16, so no row is to blame; " in said
    assert said.endswith("start over in another directory with --dtype float32")


def test_an_empty_prompt_acquits_the_model_once_for_each_bucket(tmp_path, command, noisy, manifest):
    manifest.write_text(
        '{"prompt": "a star", "num_images": 9}\n'
        '{"prompt": "a star", "width": 32, "num_images": 2}\n{"prompt": "a ring"}\n'
    )
    asked = tmp_path / "asked"
    noisy(f"""
def finite(request):
    if not request.prompt:
        print(request.width, file=open({str(asked)!r}, "a"))
    return "star" not in request.prompt
noise.finite = finite
""")
    assert cli.main(command(tmp_path / "out")) == 3
    failed = failures(tmp_path / "out")
    assert failed == dict.fromkeys(list(failed), "the model's values were not finite")
    assert len(failed) == 11
    assert sorted(asked.read_text().split()) == ["32", "64"]


def test_too_little_memory_blames_no_row(tmp_path, command, faulty, capsys):
    faulty(at("star", 'raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")'))
    assert cli.main(command(tmp_path / "out")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        "a batch of 8 images of 64x64 does not fit in the memory of 1 x cpu; free some memory, or "
        "start over in another directory with a smaller --batch-size"
    )


def test_a_row_that_kills_the_process_is_given_up_after_three_deaths(
    tmp_path, command, noisy, capsys, noise
):
    directory = tmp_path / "out"
    noisy(in_noise_at("star", "import os; os.kill(os.getpid(), 11)"))
    assert cli.main(command(directory, "--negative-prompt=")) == 3
    said = capsys.readouterr().err
    # Two shards kill the worker in their first batch; then each of three images does so twice.
    assert said.count("a worker died of SIGSEGV; restarting it") == 8
    reason = "the process died of SIGSEGV, 3 times"
    assert failures(directory) == dict.fromkeys(STAR_KEYS, reason)
    assert cli.main(["verify", str(directory)]) == 0
    noisy()
    assert cli.main(command(directory, "--retry-failed")) == 0
    assert files(directory) == files(noise())


def test_a_device_that_kills_every_process_blames_no_row(tmp_path, command, noisy, capsys):
    directory = tmp_path / "out"
    noisy(in_noise_at("", "import os; os.kill(os.getpid(), 9)"))
    assert cli.main(command(directory)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "jaxdiff: a worker died of SIGKILL while making no image"
    assert not list((directory / names.DONE).glob("*"))
    noisy()
    assert cli.main(command(directory)) == 0


def test_a_size_that_makes_the_model_fail_affects_only_its_rows(
    tmp_path, command, faulty, manifest
):
    manifest.write_text(
        '{"prompt": "a ring"}\n{"prompt": "a star", "width": 32}\n{"prompt": "a cross"}\n'
    )
    faulty("""
from jaxdiff.engine.sampler import Sampler
def wrapped(self, batch, *how):
    if batch[0].width == 32:
        raise RuntimeError("too narrow")
    return dispatch(self, batch, *how)
dispatch, Sampler._dispatch = Sampler._dispatch, wrapped
""")
    assert cli.main(command(tmp_path / "out")) == 3
    assert failures(tmp_path / "out") == {"000000001": "RuntimeError: too narrow"}


def test_a_damaged_shard_is_not_retried(tmp_path, command, noisy, capsys):
    directory = tmp_path / "out"
    noisy(in_noise_at("star", 'raise RuntimeError("no stars")'))
    assert cli.main(command(directory)) == 3
    noisy()
    path = directory / "data" / "train-00000.tar"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    assert cli.main(command(directory, "--retry-failed")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "data/train-00000.tar is missing or has changed; run `jaxdiff verify" in said
    # A repair remakes exactly what the first run made, so the failure must happen again too.
    noisy(in_noise_at("star", 'raise RuntimeError("no stars")'))
    assert cli.main(["verify", str(directory), "--repair"]) == 0
    noisy()
    assert cli.main(command(directory, "--retry-failed")) == 0


def test_a_worker_that_cannot_load_the_model_ends_the_job(tmp_path, command, faulty, capsys):
    faulty("import os; os._exit(5)")
    assert cli.main(command(tmp_path / "out")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "jaxdiff: a worker ended with exit code 5 while making no image"


def once(folder: Path, fault: str) -> str:
    """Returns code for a fault that happens in the first of the workers only."""
    path = str(folder / "once")
    return f"import os, time; os.path.exists({path!r}) or (open({path!r}, 'w'), {fault})"


def test_a_worker_that_hangs_is_restarted(tmp_path, command, noisy, capsys, noise):
    directory = tmp_path / "out"
    noisy(in_noise_at("star", once(tmp_path, "time.sleep(1e6)")))
    assert cli.main(command(directory, "--patience=10")) == 0
    assert "a worker finished no batch in 10 s (--patience); restarting it" in (
        capsys.readouterr().err
    )
    assert files(directory) == files(noise())


def test_a_killed_worker_changes_no_byte(tmp_path, command, faulty, capsys, whole):
    """The images it was making are made again, in batches of their own."""
    directory = tmp_path / "out"
    faulty(at("two rings", once(tmp_path, "os.kill(os.getpid(), 9)")))
    assert cli.main(command(directory)) == 0
    assert capsys.readouterr().err.count("a worker died of SIGKILL; restarting it") == 1
    assert files(directory) == files(whole)


@pytest.mark.slow
def test_two_workers_make_the_same_bytes(tmp_path, command, whole):
    assert cli.main(command(tmp_path / "out", "--workers=2")) == 0
    assert files(tmp_path / "out") == files(whole)
    assert children() == []


@pytest.mark.parametrize("name", ["replace", "fsync", further("link")])
def test_a_failing_disk_is_one_line_and_the_same_command_continues(
    tmp_path, command, noisy, capsys, noise, name
):
    directory = tmp_path / "out"
    noisy(f"""
import os
def refuse(*_, **__):
    raise OSError(5, "Input/output error", "some/file")
os.{name} = refuse
""")
    assert cli.main(command(directory)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    named = directory / "data" / "train-00000.tar" if name == "replace" else "some/file"
    assert said == (
        f"jaxdiff: {named}: Input/output error; fix this, then run the same command again"
    )
    noisy()
    assert cli.main(command(directory)) == 0
    assert files(directory) == files(noise())


def test_a_missing_platform_is_rejected(tmp_path, command, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert cli.main(command(tmp_path / "out")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("jaxdiff: JAX_PLATFORMS=tpu: JAX finds no such device here")
    assert not (tmp_path / "out").exists()


def test_the_process_that_runs_beam_imports_no_jax(tmp_path, command, environment):
    code = (
        "import sys; from jaxdiff import cli; cli.main(sys.argv[1:]); print('jax' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *command(tmp_path / "out", "--limit=1")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "out" / "_SUCCESS").exists()
