"""Jobs whose images are steered by ControlNets."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_controlnets import KINDS, of_unet
from test_images_in import picture

import jaxdiff
from jaxdiff import cli
from jaxdiff.checks import BadValueError
from jaxdiff.errors import InputError
from jaxdiff.families.opening import open_ensemble

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("nets")
    return [of_unet(folder / f"net{seed}", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> Path:
    return of_unet(tmp_path_factory.mktemp("union") / "net", 3, **KINDS)


@pytest.fixture(autouse=True)
def pictures(tmp_path) -> None:
    """Writes the pictures that rows name."""
    for name in ("a", "b", "c"):
        picture(ord(name)).save(tmp_path / f"{name}.png")


def records(output: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(output / "metadata").to_pylist()}


def test_order_batches_and_neighbors_change_nothing(generate, nets, tmp_path):
    rows = [
        {"id": f"{name}{scale}", "control_image": f"{name}.png", "seed": 1}
        | {"controlnet_conditioning_scale": scale, "image": "c.png", "strength": 0.7}
        for name in ("a", "b")
        for scale in (0.5, 1.0, 2.0)
    ]
    assert generate(rows, f"--controlnet={nets[0]}") == 0
    other = [rows[i] for i in (5, 0, 3, 1)]
    options = ("--images-per-shard=3", "--batch-size=3")
    assert generate(other, f"--controlnet={nets[0]}", *options, output="other") == 0
    first, second = records(tmp_path / "out"), records(tmp_path / "other")
    assert len({row["pixel_sha256"] for row in first.values()}) == 6
    for name, row in second.items():
        assert row["pixel_sha256"] == first[name]["pixel_sha256"]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("noisy")
def test_records_name_every_control_image_and_scale(generate, nets, tmp_path):
    row = {"id": "x", "control_image": ["a.png", "b.png"], "control_guidance_end": 0.7}
    options = (f"--controlnet={nets[0]}:0.5", f"--controlnet={nets[1]}", "--weights=int8")
    assert generate([row], *options) == 0
    found = records(tmp_path / "out")["x"]
    assert found["control_image"] == '["a.png", "b.png"]'
    assert found["controlnet_conditioning_scale"] == "[0.5, 1.0]"
    assert (found["control_guidance_start"], found["control_guidance_end"]) == (0.0, 0.7)
    assert len({*json.loads(found["control_image_sha256"])}) == 2
    assert found["init_image"] is found["strength"] is None
    assert "controlnet=net1:0.5, controlnet=net2:1" in found["options"]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert generate([row], *options, "--dry-run") == 0


@pytest.mark.usefixtures("noisy")
def test_bad_rows_are_rejected_alone(generate, nets, tmp_path):
    row = {"control_image": "a.png"}
    bad = {
        "the job has --controlnet: give the row control_image": {},
        "but the job has --controlnet 1 times": {"control_image": ["a.png", "b.png"]},
        "image d.png does not exist": {"control_image": "d.png"},
        "from 0 to 10, not 11": {**row, "controlnet_conditioning_scale": 11},
        "control_guidance_start = 1 must be less than control_guidance_end = 1": {
            **row,
            "control_guidance_start": 1,
        },
        "control_mode is for union ControlNets only; leave it out": {**row, "control_mode": 0},
        "control_mode must be a whole number from 0 to 99, not 'edges'": {
            **row,
            "control_mode": "edges",
        },
    }
    assert generate([*bad.values(), row], f"--controlnet={nets[0]}") == 0
    said = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    for reason, line in zip(bad, said, strict=True):
        assert reason in json.loads(line)["reason"]
    (found,) = records(tmp_path / "out").values()
    assert "control_mode" not in found


@pytest.mark.slow
def test_a_union_net_sees_images_of_several_kinds(generate, union, tmp_path, capsys):
    rows = [
        {"id": "2", "seed": 1, "control_image": "a.png", "control_mode": 2},
        {"id": "0", "seed": 1, "control_image": ["a.png"], "control_mode": [0]},
        {"id": "[2, 0]", "seed": 1, "control_image": ["a.png", "b.png"], "control_mode": [2, 0]},
    ]
    assert generate(rows, f"--controlnet={union}:0.5", "--dry-run") == 0
    assert "noise, control by 2 images" in capsys.readouterr().out
    assert generate(rows, f"--controlnet={union}:0.5") == 0
    found = records(tmp_path / "out")
    assert {name: row["control_mode"] for name, row in found.items()} == {
        each: each for each in found
    }
    assert found["[2, 0]"]["controlnet_conditioning_scale"] == "[0.5, 0.5]"
    assert len({row["pixel_sha256"] for row in found.values()}) == 3
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "give the row control_mode, from 0 to 2$"),
        ({"control_mode": 3}, "control_mode = 3 must be from 0 to 2, because the ControlNet knows"),
        ({"control_mode": (0, 1)}, "control_mode has 2 numbers for 1 images; give one for each"),
        ({"control_image": ("a.png",) * 2, "control_mode": 1}, "has 1 numbers for 2 images"),
    ],
)
def test_rows_that_do_not_fit_a_union_net(tiny_checkpoint, union, row, reason):
    request = jaxdiff.Request(**{"prompt": "", "steps": 4, "control_image": "a.png", **row})
    with pytest.raises(BadValueError, match=reason):
        open_ensemble(tiny_checkpoint, controlnet=[str(union)]).with_images(request)


def test_a_control_mode_without_an_image(tiny_checkpoint):
    request = jaxdiff.Request(prompt="", steps=4, control_mode=1)
    with pytest.raises(BadValueError, match="control_mode needs a control_image; add one"):
        open_ensemble(tiny_checkpoint).with_images(request)


def test_union_nets_are_not_used_together_with_others(tiny_checkpoint, union, nets):
    with pytest.raises(InputError, match="cannot be used together with others"):
        open_ensemble(tiny_checkpoint, controlnet=[str(union), str(nets[0])])


def test_a_control_image_without_a_net_is_rejected(generate, capsys):
    assert generate([{"control_image": "a.png"}]) == 2
    assert "control_image needs --controlnet; add that to the job, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"cross_attention_dim": 64}, "the ControlNet's cross_attention_dim = 64 does not fit"),
        ({"layers_per_block": 2}, "the ControlNet's layers_per_block = 2 does not fit"),
    ],
)
def test_a_net_for_another_model_is_refused(generate, tmp_path, capsys, config, reason):
    net = of_unet(tmp_path / "net", 1, **config)
    assert generate([{"control_image": "a.png"}], f"--controlnet={net}") == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"conditioning_embedding_out_channels": (4, 8)}, "takes 2 pixels per latent, the model 8"),
        ({"conditioning_channels": 4}, "conditioning_channels = 4"),
        ({"in_channels": 8}, "the ControlNet's in_channels = 8 does not fit"),
    ],
)
def test_what_else_does_not_fit_is_refused(tiny_checkpoint, tmp_path, config, reason):
    net = of_unet(tmp_path / "net", 1, **config)
    with pytest.raises(InputError, match=reason):
        jaxdiff.load(tiny_checkpoint, controlnet=net)


@pytest.mark.slow
def test_canny_shows_the_edges(generate, nets, tmp_path):
    square = Image.new("RGB", (64, 64), "white")
    square.paste("red", (16, 16, 48, 48))
    square.save(tmp_path / "square.png")
    edges = cv2.Canny(np.asarray(square), 100, 200)
    assert 100 < (edges > 0).sum() < 200
    Image.fromarray(edges).save(tmp_path / "edges.png")
    row = {"id": "x", "seed": 1}
    arguments = [f"--controlnet={nets[0]}", "--preprocess=canny"]
    assert generate([{**row, "control_image": "square.png"}], *arguments) == 0
    assert generate([{**row, "control_image": "edges.png"}], arguments[0], output="other") == 0
    ours, theirs = (records(tmp_path / name)["x"] for name in ("out", "other"))
    assert ours["pixel_sha256"] == theirs["pixel_sha256"]
    assert "preprocess=canny" in ours["options"]


def test_canny_without_opencv_is_refused(generate, nets, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    arguments = [f"--controlnet={nets[0]}", "--preprocess=canny"]
    assert generate([{"control_image": "a.png"}], *arguments) == 2
    assert "pip install 'jaxdiff[control]'" in capsys.readouterr().err


def test_what_is_no_controlnet_is_refused(generate, tmp_path, capsys):
    row = {"control_image": "a.png"}
    assert generate([row], f"--controlnet={tmp_path / 'none'}") == 2
    assert "is not a folder on this machine" in capsys.readouterr().err
    assert generate([row], f"--controlnet={tmp_path}:99") == 2
    assert "the scale must be a number from 0 to 10, not '99'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--preprocess=canny", "--guess-mode=on"])
def test_options_of_controlnets_need_one(generate, option, capsys):
    assert generate([{}], option) == 2
    assert "has no effect without --controlnet" in capsys.readouterr().err
