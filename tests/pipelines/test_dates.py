"""What scheduled jobs need: `{date}` in paths, and manifests that may be missing."""

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from jaxdiff import cli
from pipelines import generate_options, inputs

DAY = "2026-11-28"
PATHS = ("--manifest=in/{date}.txt", "--output=out/{date}")


@pytest.fixture(autouse=True)
def without_a_day(monkeypatch):
    monkeypatch.delenv("JAXDIFF_DATE", raising=False)


def parsed(*arguments: str) -> tuple[str, str]:
    job, rest = generate_options.parse(list(arguments))
    assert rest == []
    return job.manifest, str(job.output)


def test_the_day_is_an_option_or_else_the_environments(monkeypatch):
    assert parsed(*PATHS, "--date", DAY) == (f"in/{DAY}.txt", f"out/{DAY}")
    monkeypatch.setenv("JAXDIFF_DATE", "2026-11-27")
    assert parsed(*PATHS) == ("in/2026-11-27.txt", "out/2026-11-27")
    assert parsed(*PATHS, f"--date={DAY}") == (f"in/{DAY}.txt", f"out/{DAY}")


def test_a_day_stands_wherever_a_path_names_it_and_other_braces_stay():
    manifest, output = parsed(
        "--manifest=gs://b/{date}/{a,b}/{date}.txt", "--output=o/{Date}/{}", f"--date={DAY}"
    )
    assert manifest == f"gs://b/{DAY}/{{a,b}}/{DAY}.txt"
    assert output == "o/{Date}/{}"
    assert parsed("--manifest={day}.txt", "--output={") == ("{day}.txt", "{")


@pytest.mark.parametrize("value", [DAY, f'"{DAY}"'], ids=["date", "text"])
def test_a_job_file_takes_the_same_options(tmp_path, value):
    path = tmp_path / "job.toml"
    path.write_text(
        f'manifest = "{{date}}.txt"\noutput = "{{date}}"\ndate = {value}\nif_missing = "skip"\n'
    )
    job, _ = generate_options.parse([str(path)])
    assert (job.manifest, str(job.output), job.if_missing) == (f"{DAY}.txt", DAY, "skip")
    job, _ = generate_options.parse([str(path), "--date=2026-11-29", "--if-missing=fail"])
    assert (job.manifest, job.if_missing) == ("2026-11-29.txt", "fail")


@pytest.mark.parametrize(
    "day", ["20261128", "2026-11-31", "2026-W48-6", "today", f"{DAY}T02:15", ""]
)
@pytest.mark.parametrize("source", ["--date", "JAXDIFF_DATE"])
def test_a_malformed_day_is_refused(tmp_path, monkeypatch, capsys, source, day):
    monkeypatch.chdir(tmp_path)
    option = [f"--date={day}"] if source == "--date" else []
    monkeypatch.setenv("JAXDIFF_DATE", DAY if option else day)
    assert cli.main(["generate", *PATHS, *option]) == 2
    message = f"jaxdiff: {source} must be a date such as 2026-11-28, not {day!r}\n"
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["manifest", "output"])
def test_a_path_without_its_day_is_refused(capsys, name):
    paths = {"manifest": "in.txt", "output": "out", name: "x/{date}"}
    assert cli.main(["generate", *(f"--{each}={path}" for each, path in paths.items())]) == 2
    assert capsys.readouterr().err == (
        f"jaxdiff: --{name} 'x/{{date}}' needs a day: use --date YYYY-MM-DD or set JAXDIFF_DATE\n"
    )


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["job", "dry-run"])
@pytest.mark.parametrize("manifest", ["no/{date}.txt", "no-*.jsonl", "no/"])
def test_a_missing_manifest_can_be_skipped(tmp_path, monkeypatch, capsys, manifest, more):
    monkeypatch.chdir(tmp_path)
    command = ["generate", f"--manifest={manifest}", "--output=out", f"--date={DAY}", *more]
    assert cli.main([*command, "--if-missing=skip"]) == 0
    said = capsys.readouterr()
    shown = manifest.replace("{date}", DAY)
    assert (said.out, said.err) == (f"{shown} does not exist: nothing to do\n", "")
    assert cli.main([*command, "--if-missing=fail"]) == cli.main(command) == 2
    assert capsys.readouterr().err.startswith(f"jaxdiff: manifest {shown} ")
    assert list(tmp_path.iterdir()) == []


def test_only_a_missing_manifest_is_skipped(tmp_path, command, capsys):
    """One that cannot be used is still an error, and one that is there is generated."""
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.main(command(tmp_path / "out", "--if-missing=skip", manifest=empty)) == 2
    assert "does not exist" not in capsys.readouterr().err
    assert cli.main(command(tmp_path / "out", "--if-missing=skip", "--dry-run")) == 0
    assert "images: 24" in capsys.readouterr().out


def test_other_actions_are_refused(capsys):
    assert cli.main(["generate", "--manifest=a", "--output=b", "--if-missing=wait"]) == 2
    message = "jaxdiff: --if-missing must be one of fail, skip, not 'wait'\n"
    assert capsys.readouterr().err == message


def test_files_folders_and_globs_exist(tmp_path):
    (tmp_path / "a[1].txt").write_text("a ring\n")
    options = PipelineOptions()
    for there in ("", "a[1].txt", "*.txt", "**/*.txt"):
        assert inputs.exists(f"{tmp_path}/{there}", options), there
    for missing in ("b.txt", "*.csv", "b/"):
        assert not inputs.exists(f"{tmp_path}/{missing}", options), missing
