import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdiff.checkpoint.component import TOKENIZER_FILES
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may modify."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(directory: Path) -> str:
    """Returns the one-line error of opening a directory."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_complete_directory_opens_with_its_defaults(tiny_checkpoint):
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.name == "tiny"
    assert checkpoint.defaults.size == (64, 64)
    assert checkpoint.defaults.size_multiple == 8
    assert checkpoint.defaults.sampler == "ddim"
    assert checkpoint.defaults.latent_channels == 4
    assert checkpoint.config("unet")["block_out_channels"] == [32, 64]
    assert {tensor.file for tensor in checkpoint.weights("unet").values()} == {
        tiny_checkpoint / UNET
    }


def test_the_layout_needs_no_jax():
    code = "import sys, jaxdiff.checkpoint.checkpoint; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_fingerprint_depends_on_contents_only(tiny_checkpoint, checkpoint):
    fingerprint = open_checkpoint(tiny_checkpoint).fingerprint
    (checkpoint / "README.md").write_text("A card affects no pixel.")
    assert len(fingerprint) == 64
    assert open_checkpoint(checkpoint).fingerprint == fingerprint


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", UNET],
)
def test_any_byte_that_affects_pixels_changes_the_fingerprint(checkpoint, name):
    before = open_checkpoint(checkpoint).fingerprint
    content = (checkpoint / name).read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1]) if name == UNET else content + b" "
    (checkpoint / name).write_bytes(changed)
    assert open_checkpoint(checkpoint).fingerprint != before


@pytest.mark.parametrize(
    "name",
    [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        UNET,
    ],
)
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert f"{checkpoint / name} is missing" in refusal(checkpoint)


def test_a_missing_vocabulary_is_named(checkpoint):
    (checkpoint / "tokenizer" / "merges.txt").unlink()
    assert "merges.txt" in refusal(checkpoint)


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 0.98])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_truncated_tokenizer_is_named(checkpoint, name, share):
    path = checkpoint / "tokenizer" / name
    os.truncate(path, int(share * path.stat().st_size))
    assert str(path) in refusal(checkpoint)


def test_merges_truncated_anywhere_are_rejected(checkpoint):
    path = checkpoint / "tokenizer" / "merges.txt"
    content = path.read_bytes()
    assert content.endswith(b"\n")  # optional: some of CLIP's own copies lack it
    for kept in range(len(content) - 2, 0, -11):
        path.write_bytes(content[:kept])
        assert str(path) in refusal(checkpoint)
    path.write_bytes(content[:-1])
    open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b'{"a": 0, "b": 0}'),
        ("vocab.json", b'{"a": 0, "b": "1"}'),
        ("vocab.json", b'{"a": 0, "b": [1]}'),
        ("vocab.json", b'{"a": -1}'),
        ("vocab.json", b"[]"),
        ("merges.txt", b"\xff\xfe"),
        ("merges.txt", b"#version: 0.2\na b c\n"),
        ("tokenizer.json", b'{"version": "1.0", '),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        ("tokenizer_config.json", b'{"model_max_length": "abc"}'),
        ("tokenizer_config.json", b'{"model_max_length": 1}'),
        ("tokenizer_config.json", b'{"model_max_length": true}'),
        ("tokenizer_config.json", b'{"model_max_length": 77.5}'),
        ("tokenizer_config.json", b'{"pad_token": ["a"]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": ["a"]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": "a"}}'),
        ("tokenizer_config.json", b'{"vocab": "/etc/passwd", "merges": "/etc/passwd"}'),
        ("special_tokens_map.json", b'{"eos_token": 5}'),
        ("special_tokens_map.json", b'{"eos_token": {"content": 5}}'),
        ("added_tokens.json", b'{"<a>": "x"}'),
        ("added_tokens.json", b'{"<a>": 5, "<b>": 5}'),
    ],
)
def test_a_broken_tokenizer_is_named(checkpoint, name, content):
    (checkpoint / "tokenizer" / name).write_bytes(content)
    assert str(checkpoint / "tokenizer" / name) in refusal(checkpoint)


FULL_TOKENIZER = {
    "added_tokens": [{"id": 1, "content": "<a>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "<a>": 1, "aa": 2}, "merges": [["a", "a"]]},
}


def of_model(**changes) -> dict:
    return FULL_TOKENIZER | {"model": FULL_TOKENIZER["model"] | changes}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": FULL_TOKENIZER["model"]}, "lacks added_tokens"),
        (FULL_TOKENIZER | {"added_tokens": {"<a>": 1}}, "lacks added_tokens"),
        (FULL_TOKENIZER | {"added_tokens": [{"content": "<a>"}]}, "is not a token"),
        (FULL_TOKENIZER | {"added_tokens": [{"id": 1}]}, "is not a token"),
        (FULL_TOKENIZER | {"model": []}, "lacks a vocabulary"),
        (of_model(vocab=["a"]), "not distinct whole numbers"),
        (of_model(vocab={"a": "0", "aa": 2}), "not distinct whole numbers"),
        (of_model(vocab={"a": 0, "aa": 0}), "not distinct whole numbers"),
        (of_model(merges={"a": "a"}), "does not merge two tokens"),
        (of_model(merges=[["a"]]), "does not merge two tokens"),
        (of_model(merges=[["a", 5]]), "does not merge two tokens"),
        (of_model(merges=["a b"]), "does not merge two tokens"),
        (of_model(merges=5), "does not merge two tokens"),
    ],
)
def test_a_malformed_tokenizer_json_is_named(checkpoint, content, reason):
    path = checkpoint / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(content))
    message = refusal(checkpoint)
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")], ids="dfl"
)
def test_a_tokenizers_file_that_is_no_file_is_named(checkpoint, name, make):
    path = checkpoint / "tokenizer" / name
    path.unlink(missing_ok=True)
    make(path)
    assert str(path) in refusal(checkpoint)


@pytest.mark.parametrize("length", [77, 3, None, 10**30, 1e30])
def test_a_tokenizer_may_have_no_length_limit(checkpoint, length):
    edit_json(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    open_checkpoint(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 1000, -1])
def test_a_truncated_weights_file_is_named(checkpoint, kept):
    path = checkpoint / UNET
    os.truncate(path, kept if kept >= 0 else path.stat().st_size - 1)
    assert str(path) in refusal(checkpoint)


def test_a_longer_weights_file_is_named(checkpoint):
    with (checkpoint / UNET).open("ab") as file:
        file.write(b"\0")
    assert str(checkpoint / UNET) in refusal(checkpoint)


HEADERS = {
    "not JSON": b"{]",
    "not an object": b"[]",
    "no entries": b'{"a": 1}',
    "deep": b"[" * 50_000,
    "no such dtype": b'{"a": {"dtype": "F12", "shape": [1], "data_offsets": [0, 4]}}',
    "negative size": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    "a hole": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "does not fit the shape": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
    "overlap": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
    b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "huge": b'{"a": {"dtype": "U8", "shape": [1099511627776], "data_offsets": [0, 1099511627776]}}',
    "fractions": b'{"a": {"dtype": "F32", "shape": [0.5], "data_offsets": [0, 2]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_broken_header_gives_a_one_line_error(checkpoint, header):
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (checkpoint / UNET).write_bytes(content)
    assert str(checkpoint / UNET) in refusal(checkpoint)


def test_a_huge_header_is_not_read(checkpoint):
    (checkpoint / UNET).write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    assert "not a safetensors file" in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_config_is_named(checkpoint, content):
    (checkpoint / "vae" / "config.json").write_bytes(content)
    assert str(checkpoint / "vae" / "config.json") in refusal(checkpoint)


def test_the_error_for_pickled_weights_tells_how_to_convert_them(checkpoint):
    (checkpoint / UNET).rename(checkpoint / "unet" / "diffusion_pytorch_model.bin")
    assert "save_pretrained" in refusal(checkpoint)


def test_an_unsupported_pipeline_is_rejected(checkpoint):
    edit_json(checkpoint / "model_index.json", _class_name="KolorsPipeline")
    assert "'KolorsPipeline' is not supported" in refusal(checkpoint)


def test_an_unsupported_network_is_rejected(checkpoint):
    edit_json(checkpoint / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    assert "UNet3DConditionModel" in refusal(checkpoint)


def test_a_name_that_is_neither_bundled_nor_a_directory_is_rejected(tmp_path):
    assert "neither a diffusers directory" in refusal("no-such-model")
    none = f"{tmp_path} contains no model_index.json, so it is not a diffusers directory"
    assert refusal(tmp_path).startswith(none)
    (tmp_path / "merged.safetensors").touch()
    assert "merged.safetensors" in refusal(tmp_path)


def test_the_error_for_a_networks_folder_suggests_its_parent(checkpoint, monkeypatch):
    assert "no model_index.json because it is a part of a model" in refusal(checkpoint / "unet")
    monkeypatch.chdir(checkpoint / "unet")
    assert "use its parent directory" in refusal(".")
    (checkpoint / "model_index.json").unlink()
    assert "not a diffusers directory but a single network" in refusal(".")


def test_an_overlong_name_gives_a_one_line_error():
    model = "a" * 300
    assert refusal(model) == f"model {model!r} cannot be read (File name too long)"


def test_an_unsupported_scheduler_is_an_error_only_when_it_is_needed(checkpoint):
    edit_json(
        checkpoint / "scheduler" / "scheduler_config.json", _class_name="KDPM2DiscreteScheduler"
    )
    opened = open_checkpoint(checkpoint)
    with pytest.raises(InputError, match=r"KDPM2DiscreteScheduler.*--sampler"):
        _ = opened.defaults.sampler


def test_a_size_missing_in_the_config_must_be_given(checkpoint):
    edit_json(checkpoint / "unet" / "config.json", sample_size=None)
    with pytest.raises(InputError, match="--width"):
        _ = open_checkpoint(checkpoint).defaults.size
