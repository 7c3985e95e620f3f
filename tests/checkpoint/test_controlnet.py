"""ControlNets in folders of their own: what is found in them, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.checkpoint.controlnet import open_controlnet
from jaxdiff.errors import InputError

STEM = "diffusion_pytorch_model"
WEIGHTS = {
    "conv_in.weight": np.arange(72, dtype=np.float32).reshape(2, 4, 3, 3),
    "controlnet_mid_block.bias": np.array([0.5, -1.0], np.float32),
}


def make(folder: Path, class_name="ControlNetModel", name=f"{STEM}.safetensors", dtype=np.float32):
    """Writes a folder with a config and two weights; returns it."""
    folder.mkdir(exist_ok=True)
    config = {"_class_name": class_name, "block_out_channels": [2]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.astype(dtype) for key, value in WEIGHTS.items()}, folder / name)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "canny")


def refusal(path) -> str:
    """Returns the one-line error of opening a path."""
    with pytest.raises(InputError) as caught:
        open_controlnet(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def shards(folder: Path) -> None:
    """Puts each weight in a file of its own, with diffusers' names."""
    places = {}
    for number, (key, value) in enumerate(WEIGHTS.items(), start=1):
        places[key] = f"{STEM}-0000{number}-of-00002.safetensors"
        save_file({key: value}, folder / places[key])
    (folder / f"{STEM}.safetensors").unlink()
    index = folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def check_weights(found) -> None:
    assert found.tensors.keys() == WEIGHTS.keys()
    for key, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), WEIGHTS[key])


def test_a_folder_is_opened(folder):
    found = open_controlnet(str(folder))
    check_weights(found)
    assert found.path == folder
    assert found.config == {"_class_name": "ControlNetModel", "block_out_channels": [2]}
    assert found.files.keys() == {"config.json", f"{STEM}.safetensors"}


def test_the_working_folder_and_its_parent_are_opened(folder, monkeypatch):
    (folder / "inner").mkdir()
    for inner, said in (("", "."), ("inner", "..")):
        monkeypatch.chdir(folder / inner)
        check_weights(open_controlnet(said))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_read_where_there_are_no_full_weights(tmp_path, variant):
    name = f"{STEM}.{variant}.safetensors"
    half = make(tmp_path / "half", name=name, dtype=np.float16)
    found = open_controlnet(str(half))
    check_weights(found)
    assert {tensor.dtype for tensor in found.tensors.values()} == {"F16"}
    assert name in found.files

    make(half)
    assert f"{STEM}.safetensors" in open_controlnet(str(half)).files


def test_shards_are_read(folder):
    shards(folder)
    found = open_controlnet(str(folder))
    check_weights(found)
    assert len(found.files) == 3  # the config and two shards


def test_the_fingerprint_is_that_of_the_files_wherever_they_are(folder, tmp_path):
    fingerprint = open_controlnet(str(folder)).fingerprint
    assert len(fingerprint) == 64
    copy = make(tmp_path / "copy")
    (copy / "README.md").write_text("not used")
    assert open_controlnet(str(copy)).fingerprint == fingerprint

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"freq_shift": 1}))
    assert open_controlnet(str(copy)).fingerprint != fingerprint

    half = make(tmp_path / "half", dtype=np.float16)
    assert open_controlnet(str(half)).fingerprint != fingerprint


def test_a_missing_folder_is_refused(tmp_path):
    missing = tmp_path / "none"
    assert refusal(missing) == (
        f"ControlNet {str(missing)!r} is not a folder on this machine; download it, or correct the "
        "path"
    )


@pytest.mark.parametrize("said", ["", "\0", "n" * 5000])
def test_what_is_no_path_is_refused(said):
    assert "ControlNet" in refusal(said)


@pytest.mark.parametrize("name", ["control.pth", "control.bin", "control.ckpt"])
def test_files_with_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"pickle")
    assert "not safe to read; convert it" in refusal(tmp_path / name)


def test_a_single_file_is_refused(folder):
    assert "is a file; name a folder" in refusal(folder / f"{STEM}.safetensors")


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert f"{folder} contains no config.json" in refusal(folder)
    (folder / "model_index.json").write_text("{}")
    assert "it is a whole pipeline" in refusal(folder)


@pytest.mark.parametrize(
    "class_name",
    [
        *("MultiControlNetModel", "SD3ControlNetModel", "T2IAdapter"),
        *("UNet2DConditionModel", None, 7, ["ControlNetModel"]),
    ],
)
def test_other_networks_are_refused_by_their_class(tmp_path, class_name):
    folder = make(tmp_path / "other", class_name)
    error = refusal(folder)
    assert f"{folder / 'config.json'}: {class_name!r} is not supported" in error
    assert "use a ControlNetModel" in error


@pytest.mark.parametrize("class_name", ["ControlNetModel", "ControlNetUnionModel"])
def test_a_union_network_is_recognised_by_its_weights(folder, class_name):
    """The released ones have the plain class in their config."""
    make(folder, class_name)
    rows = {"task_embedding": np.zeros((8, 2), np.float32)}
    save_file(WEIGHTS | rows, folder / f"{STEM}.safetensors")
    found = open_controlnet(str(folder))
    assert found.config["_class_name"] == "ControlNetUnionModel"
    assert found.kinds == 8


@pytest.mark.parametrize(("class_name", "kinds"), [("FluxControlNetModel", 10), (None, None)])
def test_how_many_kinds_of_images_a_network_knows(folder, class_name, kinds):
    make(folder, class_name or "ControlNetModel")
    rows = {"controlnet_mode_embedder.weight": np.zeros((10, 2), np.float32)} if kinds else {}
    save_file(WEIGHTS | rows, folder / f"{STEM}.safetensors")
    assert open_controlnet(str(folder)).kinds == kinds


@pytest.mark.parametrize("name", [f"{STEM}.bin", "control.pth"])
def test_a_folder_with_only_pickles_is_refused(folder, name):
    (folder / f"{STEM}.safetensors").rename(folder / name)
    error = refusal(folder)
    assert f"{folder} contains {name} but no safetensors file" in error
    assert "not safe to read" in error


def test_a_folder_without_weights_is_refused(folder):
    (folder / f"{STEM}.safetensors").unlink()
    assert f"{folder}/{STEM}.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_config_is_refused(folder, content):
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert str(folder / "config.json") in refusal(folder)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_a_cut_off_file_is_refused(folder, kept):
    file = folder / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal(folder)


def test_a_damaged_header_is_refused(folder):
    file = folder / f"{STEM}.safetensors"
    data = bytearray(file.read_bytes())
    data[8] = ord("[")
    file.write_bytes(data)
    assert f"{file} has a broken safetensors header" in refusal(folder)


def test_weights_that_are_no_floats_are_refused(folder):
    save_file({"conv_in.weight": np.zeros(3, np.int8)}, folder / f"{STEM}.safetensors")
    assert "conv_in.weight is stored as I8" in refusal(folder)


def test_a_pipe_in_place_of_a_file_is_refused(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "is not a regular file" in refusal(folder)
