"""Jobs of FLUX.1 whose images a control image steers: by a ControlNet, or seen by the model."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import small_families
from cases import further
from small_controlnets import of_flux
from test_images_in import picture

from jaxdiff import cli

pytestmark = pytest.mark.usefixtures("compiled_fast")

DEV = small_families.SMALL["FLUX.1 dev"]
CONTROL = replace(DEV, pipeline="FluxControlPipeline").changed(
    "transformer", in_channels=128, out_channels=64
)
SIZE = ("--width=32", "--height=32", "--steps=2")


@pytest.fixture(autouse=True)
def pictures(tmp_path) -> None:
    """Writes the pictures that rows name."""
    for name in ("a", "b"):
        picture(ord(name), (32, 32)).save(tmp_path / f"{name}.png")


@pytest.mark.parametrize("has_net", [False, further(True)])
def test_control_images_steer_and_rows_without_one_are_rejected(
    generate, tmp_path, has_net, capsys
):
    model = small_families.save(DEV if has_net else CONTROL, tmp_path / "model")
    options = []
    if has_net:
        options = [f"--controlnet={of_flux(tmp_path / 'net', 1)}", "--weights=w8a8"]
    rows = [
        {"id": "a", "seed": 1, "control_image": "a.png"},
        {"id": "b", "seed": 1, "control_image": "b.png"},
        {"id": "none", "seed": 1},
    ]
    assert generate(rows, *SIZE, *options, "--dry-run", model=model) == 0
    assert "noise, control" in capsys.readouterr().out
    assert generate(rows, *SIZE, *options, model=model) == 0
    found = pq.read_table(tmp_path / "out" / "metadata").to_pylist()
    assert [row["control_image"] for row in found] == ["a.png", "b.png"]
    assert len({row["pixel_sha256"] for row in found}) == 2
    assert "give" in (tmp_path / "out" / "rejected.jsonl").read_text()
    assert cli.main(["verify", str(tmp_path / "out")]) == 0

    capsys.readouterr()
    assert generate(rows[:1], *SIZE, *options, "--guess-mode=on", output="x", model=model) == 2
    error = capsys.readouterr().err
    assert "--guess-mode has no effect on FLUX.1" in error
    assert error.count("\n") == 1
