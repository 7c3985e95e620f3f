"""Jobs whose images are steered by ControlNets."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from random_weights import random_params
from test_images_in import picture

import jaxdiff
from jaxdiff import cli
from jaxdiff.errors import InputError
from jaxdiff.models.controlnet import ControlNetConfig, ControlNetModel
from jaxdiff.weights.save import save_params


def write_net(folder: Path, seed: int, **config) -> Path:
    """Writes a ControlNet with random weights for the tiny checkpoint."""
    read = ControlNetConfig(
        **{
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "conditioning_embedding_out_channels": (4, 4, 8, 8),
            **config,
        }
    )
    folder.mkdir()
    params = random_params(ControlNetModel, read, seed)
    save_params(params, folder / "diffusion_pytorch_model.safetensors", "float32")
    said = {"_class_name": "ControlNetModel", **read.to_json()}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("nets")
    return [write_net(folder / f"net{seed}", seed) for seed in (1, 2)]


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


def test_records_name_every_control_image_and_scale(generate, nets, tmp_path):
    row = {"id": "x", "control_image": ["a.png", "b.png"], "control_guidance_end": 0.7}
    options = (f"--controlnet={nets[0]}:0.5", f"--controlnet={nets[1]}")
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


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "the job has --controlnet: give the row control_image"),
        (
            {"control_image": ["a.png", "b.png"]},
            "but the job has --controlnet 1 times",
        ),
        ({"control_image": "d.png"}, "image d.png does not exist"),
        ({"control_image": "a.png", "controlnet_conditioning_scale": 11}, "from 0 to 10, not 11"),
        (
            {"control_image": "a.png", "control_guidance_start": 1},
            "control_guidance_start = 1 must be less than control_guidance_end = 1",
        ),
    ],
)
def test_a_bad_row_is_rejected_alone(generate, nets, tmp_path, row, reason):
    assert generate([row, {"control_image": "a.png"}], f"--controlnet={nets[0]}") == 0
    (said,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert reason in json.loads(said)["reason"]


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
    net = write_net(tmp_path / "net", 1, **config)
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
    net = write_net(tmp_path / "net", 1, **config)
    with pytest.raises(InputError, match=reason):
        jaxdiff.load(tiny_checkpoint, controlnet=net)


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
