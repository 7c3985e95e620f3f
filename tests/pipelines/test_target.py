"""A dry run for a TPU slice refuses what cannot be compiled, in one line; needs no libtpu."""

import importlib.util

import pytest

from jaxdiff import cli

V5E = ("--dry-run", "--target=tpu-v5e:2x2")


@pytest.fixture
def refused(tmp_path, command, capsys):
    """Returns a function that checks that a command ends with exit code 2 and one line."""

    def refused(*more: str) -> str:
        assert cli.main(command(tmp_path / "out", *more)) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    return refused


@pytest.fixture
def libtpu(tmp_path, monkeypatch):
    """Returns a function that installs a libtpu of a version, with nothing in it."""

    def install(version: str) -> None:
        folder = tmp_path / "packages" / f"libtpu-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))

    return install


def test_a_slice_must_exist(refused):
    assert "there is no such slice; v5e has 1x1, 2x2" in refused(
        "--dry-run", "--target=tpu-v5e:3x3"
    )


def test_a_target_needs_a_dry_run(refused):
    assert "--target is for a dry run: add --dry-run" in refused(V5E[1])


def test_the_bill_needs_a_dry_run(refused):
    said = refused("--price-per-chip-hour=1.2")
    assert "--price-per-chip-hour is for a dry run: add --dry-run" in said


def test_a_share_of_the_peak_needs_a_target(refused):
    assert "--utilisation needs --target" in refused("--dry-run", "--utilisation=0.5")


@pytest.mark.parametrize("option", ["--utilisation=0", "--price-per-chip-hour=-1"])
def test_numbers_have_limits(option, refused):
    assert f"{option.partition('=')[0]} must be a number from" in refused(*V5E, option)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_compiler_is_named(refused):
    assert refused(*V5E).endswith("the compiler for TPUs: pip install 'jaxdiff[tpu-aot]'")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is not None, reason="the CUDA plugin is installed"
)
def test_the_missing_compiler_for_gpus_is_named(refused):
    said = refused("--dry-run", "--target=h100:1")
    assert said.endswith("the compiler for GPUs: pip install 'jaxdiff[gpu-aot]'")


def test_a_compiler_of_another_version_is_refused(refused, libtpu):
    libtpu("0.0.1")
    said = refused(*V5E)
    assert "libtpu 0.0.1 is installed, but JAX needs libtpu==" in said
    assert said.endswith("pip install 'jaxdiff[tpu-aot]'")


def test_a_mesh_must_fit_a_host_of_the_slice(refused, libtpu):
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    (pin,) = {str(Requirement(r).specifier) for r in requires("jax") if r.startswith("libtpu")}
    libtpu(pin.removeprefix("==").replace("*", "0"))
    said = refused(*V5E, "--mesh=data=4,model=2")
    assert said.endswith("--mesh data=4,model=2: needs 8 devices, but there are 4")
