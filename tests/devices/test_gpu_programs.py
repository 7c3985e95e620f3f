"""Real GPU programs, compiled by JAX's CUDA plugin without a GPU or a driver."""

import pytest

from jaxdiff import cli

pytestmark = pytest.mark.gpu_aot


@pytest.mark.parametrize(
    ("target", "mesh", "exchanges"),
    [
        ("a100:1", "data=1", False),
        ("h100:2", "data=2", False),
        ("h100:4", "data=2,model=2", True),
        ("h200:1", "data=1", False),
    ],
)
def test_a_dry_run_compiles_for_gpus(
    target, mesh, exchanges, tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    command = ["generate", f"--manifest={prompts}", f"--output={tmp_path / 'out'}", "--dry-run"]
    command += [f"--model={tiny_checkpoint}", "--steps=3", "--batch-size=2", "--dtype=bfloat16"]
    assert cli.main([*command, f"--target={target}", f"--mesh={mesh}"]) == 0
    said = capsys.readouterr().out
    assert "  it fits: " in said
    assert ("exchanges between chips: none" in said) != exchanges
    assert "estimate" not in said
    assert f"the job on {target}: about " in said
