"""Programs that are compiled ahead are those that a job needs; what cannot be used is refused."""

import functools
import os
import resource
import shutil
import signal
import subprocess

import pytest

from jaxdiff import cli

pytestmark = pytest.mark.usefixtures("compiled_fast")
# Around the programs that are compiled ahead, JAX compiles these, which take a moment.
SMALL = {"jit__jax_normal", "jit_dynamic_slice", "jit_squeeze", "jit_stack"}
ROWS = '{"prompt": "a"}\n{"prompt": "b", "width": 16, "height": 8, "guidance_scale": 1}\n'


MOST_BYTES = 2**15


def limit() -> None:
    """Lets this process write small files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.fixture
def compiling(tmp_path, command):
    """Returns the arguments that compile two kinds of images: `compiling(output, ...)`."""
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)

    def compiling(output, *more: str) -> list[str]:
        _, *options = command(output, *more, manifest=path)
        return ["compile", *options]

    return compiling


@pytest.fixture
def refused(tmp_path, compiling, capsys):
    """Returns a function that checks that compiling ends with exit code 2 and one line."""

    def refused(*more: str, output="programs") -> str:
        capsys.readouterr()
        assert cli.main(compiling(tmp_path / output, *more)) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.splitlines()[-1]

    return refused


def test_a_job_finds_its_programs_in_a_copy_of_the_directory(
    tmp_path, compiling, monkeypatch, capsys
):
    made, copy = tmp_path / "programs", tmp_path / "copy"
    arguments = compiling(made)
    assert cli.main(arguments) == 0
    *lines, total, usage = capsys.readouterr().out.splitlines()
    *titles, small = [line.partition(" per device: ")[0] for line in lines]
    assert titles == ["the devices here, 64x64, 2 steps of ddim, guided, batch size 8"] * 2
    assert small == "the devices here, 16x8, 2 steps of ddim, not guided, batch size 256"
    for line, what in zip(lines, ("prompts", "sampling", "sampling"), strict=True):
        assert f" per device: {what}, " in line
    assert usage == f"run jaxdiff generate with JAX_COMPILATION_CACHE_DIR={made}"
    programs = {path.name for path in made.iterdir()}
    assert total.startswith(f"{made} has {len(programs)} programs, ")
    assert made.stat().st_mode & 0o077 == 0
    shutil.copytree(made, copy)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(copy))
    monkeypatch.setenv(
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"
    )  # what is missing is added
    job = [f"--output={tmp_path / 'out'}" if "--output" in each else each for each in arguments]
    assert cli.main(["generate", *job[1:]]) == 0
    added = {path.name for path in copy.iterdir()} - programs
    assert {name.partition("-")[0] for name in added} == SMALL


def test_what_others_can_write_to_is_no_directory_for_programs(tmp_path, refused):
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    os.chmod(tmp_path / "open", 0o777)
    for name in ("file", "open"):
        assert "is no directory that you, and nobody else, can write to" in refused(output=name)


def test_a_bucket_is_no_directory_for_programs(refused):
    assert "name a local directory" in refused("--output=gs://bucket/programs")


def test_the_datasets_directory_is_not_meant(tmp_path, capsys):
    job = tmp_path / "job.toml"
    job.write_text('manifest = "rows.jsonl"\noutput = "out"\n')
    assert cli.main(["compile", str(job)]) == 2
    assert "--output is missing; a job file's is for the dataset" in capsys.readouterr().err


def test_a_dry_run_is_another_command(refused):
    assert "--dry-run belongs to jaxdiff generate" in refused("--dry-run")


def test_programs_for_gpus_are_compiled_there(refused):
    said = refused("--target=h100:8")
    assert "programs for GPUs are tuned by running them; leave it out" in said


def test_a_program_that_cannot_be_written_leaves_nothing(tmp_path, compiling, monkeypatch, capsys):
    programs = tmp_path / "programs"
    monkeypatch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, preexec_fn=limit))
    assert cli.main(compiling(programs)) == 1
    said = capsys.readouterr()
    assert ": prompts, " in said.out
    assert "File too large" in said.err
    assert all(path.stat().st_size < MOST_BYTES for path in programs.iterdir())


def test_the_process_that_compiles_says_what_is_wrong(refused):
    assert refused("--mesh=data=2").endswith("--mesh data=2: needs 2 devices, but there are 1")
