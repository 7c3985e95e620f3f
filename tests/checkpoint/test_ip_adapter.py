"""IP-Adapters in published layouts: what is found in them, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.checkpoint.ip_adapter import open_ip_adapter
from jaxdiff.errors import InputError

NAME = "ip-adapter_sd15.safetensors"
ATTENTION = {
    "ip_adapter.1.to_k_ip.weight": np.full((2, 3), 0.5, np.float32),
    "ip_adapter.1.to_v_ip.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
}
PLAIN = ATTENTION | {
    "image_proj.proj.weight": np.ones((12, 5), np.float32),
    "image_proj.norm.weight": np.ones(3, np.float32),
}
PLUS = ATTENTION | {
    "image_proj.latents": np.ones((1, 2, 4), np.float32),
    "image_proj.proj_in.weight": np.ones((4, 7), np.float32),
}
FULL_FACE = ATTENTION | {
    "image_proj.proj.0.weight": np.ones((7, 7), np.float32),
    "image_proj.proj.3.weight": np.ones(3, np.float32),
}
FACE_ID = ATTENTION | {
    "image_proj.proj.0.weight": np.ones((7, 5), np.float32),
    "image_proj.proj.2.weight": np.ones((12, 7), np.float32),
    "image_proj.norm.weight": np.ones(3, np.float32),
}
CONFIG = {"architectures": ["CLIPVisionModelWithProjection"], "hidden_size": 7}


def write_encoder(folder: Path, projection_dim=5, hidden_size=7, name="model.safetensors") -> Path:
    """Writes an image encoder of one weight and a buffer as old files have it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {
        "visual_projection.weight": np.ones((projection_dim, hidden_size), np.float32),
        "vision_model.embeddings.position_ids": np.arange(3),
    }
    save_file(weights, folder / name)
    return folder


def write(folder: Path, weights=PLAIN, name=NAME) -> Path:
    """Writes an adapter without an encoder; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / name)
    return folder / name


@pytest.fixture
def file(tmp_path) -> Path:
    write_encoder(tmp_path / "models" / "image_encoder")
    return write(tmp_path / "models")


def refusal(path) -> str:
    """Returns the one-line error of opening a path."""
    with pytest.raises(InputError) as caught:
        open_ip_adapter(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("kind", "weights"), [("plain", PLAIN), ("plus", PLUS), ("full-face", FULL_FACE)]
)
def test_a_file_is_opened_and_its_kind_told_by_its_keys(file, kind, weights):
    write(file.parent, weights)
    found = open_ip_adapter(str(file))
    assert (found.path, found.kind) == (file, kind)
    assert found.tensors.keys() == weights.keys()
    for key, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), weights[key])
    assert found.encoder == file.parent / "image_encoder"
    assert found.encoder_config == CONFIG
    assert found.encoder_tensors.keys() == {"visual_projection.weight"}
    assert found.files.keys() == {
        *("ip_adapter.safetensors", "image_encoder/config.json"),
        "image_encoder/model.safetensors",
    }


@pytest.mark.parametrize("place", ["a/image_encoder", "image_encoder", "models/image_encoder"])
def test_the_encoder_may_be_beside_the_file_or_above_it(tmp_path, monkeypatch, place):
    write_encoder(tmp_path / place)
    file = write(tmp_path / "a")
    assert open_ip_adapter(str(file)).encoder == tmp_path / place
    monkeypatch.chdir(tmp_path / "a")
    assert open_ip_adapter(NAME).encoder == tmp_path / place


def test_an_encoder_of_the_wrong_size_is_passed_over(tmp_path):
    """As for XL's adapters that are published beside another encoder than theirs."""
    write_encoder(tmp_path / "sdxl_models" / "image_encoder", projection_dim=6, hidden_size=8)
    file = write(tmp_path / "sdxl_models")
    error = refusal(file)
    assert f"{tmp_path}/sdxl_models/image_encoder (which makes 6)" in error
    assert error.count("which makes") == 1
    ours = write_encoder(tmp_path / "models" / "image_encoder")
    assert open_ip_adapter(str(file)).encoder == ours
    write(file.parent, PLUS)
    assert open_ip_adapter(str(file)).encoder == ours


def test_a_variant_of_the_encoder_is_read_where_there_are_no_full_weights(tmp_path):
    write_encoder(tmp_path / "image_encoder", name="model.fp16.safetensors")
    found = open_ip_adapter(str(write(tmp_path)))
    assert "image_encoder/model.fp16.safetensors" in found.files


def test_the_fingerprint_is_that_of_the_files_wherever_they_are(file, tmp_path):
    fingerprint = open_ip_adapter(str(file)).fingerprint
    assert len(fingerprint) == 64
    encoder = write_encoder(tmp_path / "other" / "image_encoder")
    copy = write(tmp_path / "other", name="renamed.safetensors")
    assert open_ip_adapter(str(copy)).fingerprint == fingerprint
    (encoder / "config.json").write_text(json.dumps(CONFIG | {"layer_norm_eps": 1e-6}))
    assert open_ip_adapter(str(copy)).fingerprint != fingerprint


@pytest.mark.parametrize(
    ("weights", "key"),
    [
        (FACE_ID, "image_proj.norm.weight"),
        (
            FACE_ID | {"image_proj.perceiver_resampler.proj_in.weight": np.ones((2, 2))},
            "image_proj.perceiver_resampler.proj_in.weight",
        ),
        (
            PLAIN | {"ip_adapter.0.to_q_lora.down.weight": np.ones((2, 2))},
            "ip_adapter.0.to_q_lora.down.weight",
        ),
    ],
)
def test_face_id_is_refused_by_name(file, weights, key):
    write(file.parent, weights)
    assert f"{file} is a FaceID adapter ({key})" in refusal(file)


@pytest.mark.parametrize(
    "weights", [ATTENTION, {"image_proj.latents": np.ones(1)}, {"lora_A.weight": np.ones((2, 2))}]
)
def test_other_files_are_refused(file, weights):
    write(file.parent, weights)
    assert f"{file} is not an IP-Adapter for Stable Diffusion 1 or XL" in refusal(file)


def test_a_file_without_its_first_weight_is_refused(file):
    write(file.parent, {k: v for k, v in PLUS.items() if "proj_in" not in k})
    assert f"{file} has no image_proj.proj_in.weight" in refusal(file)


def test_weights_that_are_no_floats_are_refused(file):
    write(file.parent, PLAIN | {"image_proj.proj.weight": np.ones((12, 5), np.int8)})
    assert "image_proj.proj.weight is stored as I8" in refusal(file)


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / NAME) == (
        f"IP-Adapter {str(tmp_path / NAME)!r} is not a file on this machine; download it, or "
        "correct the path"
    )


@pytest.mark.parametrize("said", ["", "\0.safetensors", f"{'n' * 5000}.safetensors"])
def test_what_is_no_path_is_refused(said):
    assert "IP-Adapter" in refusal(said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ip-adapter_sd15.bin", "other formats are not safe to read"),
        ("ip-adapter.gguf", "is not a .safetensors file"),
    ],
)
def test_other_formats_are_refused(file, name, message):
    other = file.rename(file.with_name(name))
    assert message in refusal(other)
    assert "is a folder; name" in refusal(file.parent)


def test_a_missing_encoder_is_refused(tmp_path):
    file = write(tmp_path / "models")
    assert f"IP-Adapter {file} has no folder image_encoder beside it" in refusal(file)


def test_an_encoder_without_safetensors_or_config_is_refused(file):
    encoder = file.parent / "image_encoder"
    (encoder / "config.json").unlink()
    assert f"{encoder}/config.json is missing" in refusal(file)
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    assert "contains pytorch_model.bin but no safetensors file" in refusal(file)


@pytest.mark.parametrize("part", [NAME, "image_encoder/model.safetensors"])
def test_damaged_files_are_refused(file, part):
    path = file.parent / part
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    assert f"{path} has {len(data) - 1} bytes" in refusal(file)
    data[8] = ord("[")
    path.write_bytes(data)
    assert f"{path} has a broken safetensors header" in refusal(file)
