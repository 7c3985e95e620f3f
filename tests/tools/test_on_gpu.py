"""tools/on_gpu.sh: the script for a GPU machine without a network, as far as a CPU goes."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPT, WHEELS = ROOT / "tools" / "on_gpu.sh", ROOT / "tools" / "on_gpu_wheels.txt"
PROGRAMS = Path(sys.executable).parent


def on_gpu(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
    )


def test_the_script_has_no_mistakes_that_shells_and_shellcheck_see():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    subprocess.run([PROGRAMS / "shellcheck", "--norc", SCRIPT], check=True)


@pytest.mark.parametrize("arguments", [(), ("identity",), ("nonsense", "out")])
def test_other_arguments_give_the_usage_and_write_nothing(tmp_path, arguments):
    said = on_gpu(*(tmp_path / each if each == "out" else each for each in arguments))
    assert (said.returncode, said.stdout) == (2, "")
    assert "bash tools/on_gpu.sh STEP OUT" in said.stderr
    assert [*tmp_path.iterdir()] == []


def test_the_carried_packages_are_those_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["parity"]
    wanted = [Requirement(line) for line in asked]
    environment = {"python_version": "3.12"}
    for line in WHEELS.read_text().splitlines():
        if not line.startswith("#"):
            carried = Requirement(line)
            (exact,) = carried.specifier
            for each in wanted:
                is_meant = each.marker is None or each.marker.evaluate(environment)
                if each.name == carried.name and is_meant:
                    assert exact.version in each.specifier


@pytest.mark.slow
def test_a_step_that_is_run_again_measures_only_what_is_missing(tmp_path):
    setting = {"MODELS": "shapes64-4step", "DTYPES": "float32", "BATCHES": "8"}
    assert on_gpu("identity", tmp_path, **setting).returncode == 0
    results = tmp_path / "results"
    written = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    stem = "identity-shapes64-4step-float32"
    endings = (".json", ".md", ".npz")
    assert written.keys() == {f"{stem}{more}{end}" for more in ("", "-anew") for end in endings}
    assert "| process | no | 0 |" in (results / f"{stem}-anew.md").read_text()
    (results / f"{stem}-anew.npz").unlink()
    table = results / f"{stem}.md"
    table.write_text(table.read_text().replace("| yes | 0 |", "| yes | 3 |", 1))
    said = on_gpu("identity", tmp_path, **setting)
    assert (said.returncode, said.stdout.count("| yes | 3 |")) == (1, 1)  # a broken promise is kept
    assert (results / f"{stem}.npz").stat().st_mtime_ns == written[f"{stem}.npz"]
    assert (results / f"{stem}-anew.npz").exists()
