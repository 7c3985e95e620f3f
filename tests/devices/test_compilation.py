"""Compiled programs are cached in the user's directory; if they cannot be, a warning says so."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from jaxdiff.devices import compilation

KEEP = (
    "import jax, logging; logging.basicConfig(); from jaxdiff.devices import compilation; "
    "compilation.keep_programs(); print(jax.config.jax_compilation_cache_dir); "
    "compilation.jit(lambda x: x * 2)(1.0)"
)


def keep(**environment):
    """Runs `KEEP` in another process, without this one's JAX settings."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", KEEP]
    environment = {**inherited, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_programs_are_stored_in_the_users_cache(tmp_path):
    folder, errors = keep(XDG_CACHE_HOME=str(tmp_path))
    assert folder.startswith(f"{tmp_path}/jaxdiff/xla/")
    assert len(os.listdir(folder)) > 0
    assert os.stat(folder).st_mode & 0o077 == 0
    assert errors == ""


def test_jaxs_own_setting_takes_precedence(tmp_path):
    folder, _ = keep(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own")
    assert not (tmp_path / "jaxdiff").exists()


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path):
    (tmp_path / "file").write_text("")
    folder, errors = keep(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert folder == "None"
    assert "compiled programs are not cached" in errors
    assert len(errors.splitlines()) == 1


def test_a_cache_that_others_can_write_is_not_used(tmp_path):
    folder, _ = keep(XDG_CACHE_HOME=str(tmp_path))
    os.chmod(folder, 0o777)
    assert keep(XDG_CACHE_HOME=str(tmp_path))[0] == "None"


def test_convolutions_on_a_cpu_are_xlas_own():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = jnp.ones((2, 16, 16, 64)), jnp.ones((3, 3, 64, 64))
    program = compilation.jit(convolve).lower(*shapes).compile().as_text()
    assert " convolution(" in program[program.index("ENTRY") :]


def test_an_option_unknown_to_xla_is_left_out(monkeypatch, caplog):
    monkeypatch.setitem(compilation.OPTIONS, "cpu", {"xla_cpu_of_the_future": "yes"})
    assert compilation._options.__wrapped__(jax.devices()[0]) is None
    assert "convolutions are slower" in caplog.text
