"""Weights in shards, in variants and with old names, and all kinds of damaged files."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.checkpoint.weight_files import read_weights, wanted_files
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.families.stable_diffusion import STABLE_DIFFUSION_XL

UNET = "diffusion_pytorch_model"
COMPONENTS = STABLE_DIFFUSION_XL.components


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may modify."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def shard(folder: Path, variant: str = "") -> Path:
    """Splits the U-Net's file into two shards with diffusers' names; returns the index."""
    whole = folder / f"{UNET}{variant}.safetensors"
    tensors = load_file(whole)
    keys = sorted(tensors)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    places = {}
    for number, half in enumerate(halves, start=1):
        name = f"{UNET}{variant}-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in half}, folder / name)
        places |= dict.fromkeys(half, name)
    whole.unlink()
    index = folder / f"{UNET}.safetensors.index{variant}.json"
    total = sum(tensor.nbytes for tensor in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return index


def to_half(path: Path, new: Path) -> None:
    """Writes a file's tensors to another file as float16."""
    save_file({key: tensor.astype(np.float16) for key, tensor in load_file(path).items()}, new)


def files(opened, network: str) -> set[str]:
    return {tensor.file.name for tensor in opened.weights(network).values()}


def refusal(directory: Path, variant: str | None = None) -> str:
    """Returns the one-line error of opening a directory."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(directory, variant)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shards_give_the_same_weights_as_one_file(checkpoint, tiny_checkpoint):
    shard(checkpoint / "unet")
    sharded, whole = open_checkpoint(checkpoint), open_checkpoint(tiny_checkpoint)
    assert len(files(sharded, "unet")) == 2
    assert sharded.weights("unet").keys() == whole.weights("unet").keys()
    for key, tensor in sharded.weights("unet").items():
        np.testing.assert_array_equal(tensor.read(), whole.weights("unet")[key].read())
    assert sharded.fingerprint != whole.fingerprint  # it hashes files, not weights


def edit_index(path: Path, change) -> None:
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


FIRST, SECOND = (f"{UNET}-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX_FAULTS = {
    "no map": (lambda index: index.pop("weight_map"), "weight_map"),
    "empty map": (lambda index: index.update(weight_map={}), "weight_map"),
    "out of the folder": (
        lambda index: index["weight_map"].update({"conv_in.bias": "../vae/model.safetensors"}),
        r"'../vae/model.safetensors'",
    ),
    "absolute": (
        lambda index: index["weight_map"].update({"conv_in.bias": "/etc/model.safetensors"}),
        "'/etc/model.safetensors'",
    ),
    "no name": (lambda index: index["weight_map"].update({"conv_in.bias": 7}), "names 7"),
    "another file": (
        lambda index: index["weight_map"].update({"conv_in.bias": SECOND}),
        f"conv_in.bias should be in {SECOND} but is in {FIRST}",
    ),
    "a key too many": (
        lambda index: index["weight_map"].update({"extra": FIRST}),
        "extra should be",
    ),
    "a key too few": (
        lambda index: index["weight_map"].pop("conv_in.bias"),
        "conv_in.bias should be in no file",
    ),
    "another size": (lambda index: index["metadata"].update(total_size=1), "should have 1 bytes"),
}


@pytest.mark.parametrize(("change", "message"), INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_an_index_that_contradicts_its_shards_is_named(checkpoint, change, message):
    index = shard(checkpoint / "unet")
    edit_index(index, change)
    error = refusal(checkpoint)
    assert str(index) in error
    assert message in error


def test_the_size_in_an_index_is_optional(checkpoint):
    edit_index(shard(checkpoint / "unet"), lambda index: index.pop("metadata"))
    open_checkpoint(checkpoint)


def test_a_missing_or_truncated_shard_is_named(checkpoint):
    shard(checkpoint / "unet")
    path = checkpoint / "unet" / SECOND
    os.truncate(path, path.stat().st_size - 1)
    assert str(path) in refusal(checkpoint)
    path.unlink()
    assert f"{path} is missing" in refusal(checkpoint)


def test_a_key_in_two_shards_is_named(checkpoint):
    shard(checkpoint / "unet")
    folder = checkpoint / "unet"
    both = load_file(folder / SECOND) | {"conv_in.bias": load_file(folder / FIRST)["conv_in.bias"]}
    save_file(both, folder / SECOND)
    assert f"{folder / SECOND}: conv_in.bias is also in {FIRST}" in refusal(checkpoint)


def test_networks_without_the_variant_use_their_full_weights(checkpoint):
    folder = checkpoint / "unet"
    to_half(folder / f"{UNET}.safetensors", folder / f"{UNET}.fp16.safetensors")
    assert files(open_checkpoint(checkpoint), "unet") == {f"{UNET}.safetensors"}
    opened = open_checkpoint(checkpoint, "fp16")
    assert files(opened, "unet") == {f"{UNET}.fp16.safetensors"}
    assert files(opened, "vae") == {f"{UNET}.safetensors"}
    assert opened.fingerprint != open_checkpoint(checkpoint).fingerprint


def test_without_full_weights_fp16_is_preferred_to_bf16(checkpoint):
    folder = checkpoint / "unet"
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.bf16.safetensors")
    assert files(open_checkpoint(checkpoint), "unet") == {f"{UNET}.bf16.safetensors"}
    to_half(folder / f"{UNET}.bf16.safetensors", folder / f"{UNET}.fp16.safetensors")
    assert files(open_checkpoint(checkpoint), "unet") == {f"{UNET}.fp16.safetensors"}
    assert files(open_checkpoint(checkpoint, "bf16"), "unet") == {f"{UNET}.bf16.safetensors"}


def test_a_variant_may_be_sharded(checkpoint):
    folder = checkpoint / "unet"
    to_half(folder / f"{UNET}.safetensors", folder / f"{UNET}.fp16.safetensors")
    index = shard(folder, ".fp16")
    assert index.name == f"{UNET}.safetensors.index.fp16.json"
    opened = open_checkpoint(checkpoint, "fp16")
    assert len(files(opened, "unet")) == 2
    assert all(".fp16-" in name for name in files(opened, "unet"))


def test_a_variant_that_no_network_has_is_rejected(checkpoint):
    assert "variant 'fp16'" in refusal(checkpoint, "fp16")
    assert "'../fp16'" in refusal(checkpoint, "../fp16")


def test_a_rare_variant_is_used_only_on_request(checkpoint):
    folder = checkpoint / "unet"
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}.non_ema.safetensors")
    assert "only the variants non_ema" in refusal(checkpoint)
    open_checkpoint(checkpoint, "non_ema")


@pytest.mark.parametrize(
    "name", [f"{UNET}.bin", f"{UNET}.fp16.bin", "diffusion_flax_model.msgpack"]
)
def test_the_error_for_another_format_tells_how_to_convert_it(checkpoint, name):
    folder = checkpoint / "unet"
    (folder / f"{UNET}.safetensors").rename(folder / name)
    error = refusal(checkpoint)
    assert f"{folder} contains {name}" in error
    assert "save_pretrained(DIRECTORY, safe_serialization=True)" in error


def test_old_names_in_the_autoencoders_attention_are_read(checkpoint, tiny_checkpoint):
    path = checkpoint / "vae" / f"{UNET}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for key in list(tensors):
        for new, name in old.items():
            if f".attentions.0.{new}." in key:
                tensors[key.replace(new, name)] = tensors.pop(key)
    save_file(tensors, path)
    renamed = open_checkpoint(checkpoint).weights("vae")
    today = open_checkpoint(tiny_checkpoint).weights("vae")
    assert renamed.keys() == today.keys()
    assert sum("query" in tensor.key for tensor in renamed.values()) == 4
    for key in today:
        np.testing.assert_array_equal(renamed[key].read(), today[key].read())


def test_a_weight_under_two_names_is_rejected(tmp_path):
    path = tmp_path / "model.safetensors"
    zeros = np.zeros(3, np.float32)
    save_file({"final_layer_norm.bias": zeros, "text_model.final_layer_norm.bias": zeros}, path)
    with pytest.raises(InputError, match=r"model\.safetensors contains \S+ twice"):
        read_weights(COMPONENTS["text_encoder"], path)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", f"unet/{UNET}.safetensors"]
)
def test_a_pipe_in_place_of_a_file_is_rejected_not_waited_for(checkpoint, name):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    assert refusal(checkpoint) == (
        f"{checkpoint / name} is not a regular file; copy the checkpoint again"
    )


BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
HEADERS = {
    "100,000 axes": json.dumps({"a": BYTE | {"shape": [1] * 100_000}}),
    "a name twice": f'{{"a": {json.dumps(BYTE)}, "a": {json.dumps(BYTE)}}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_no_writer_makes_is_rejected(checkpoint, header):
    weights = checkpoint / "unet" / f"{UNET}.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0")
    assert refusal(checkpoint) == f"{weights} has a broken safetensors header; copy it again"


def test_a_file_without_weights_is_rejected(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"text_model.embeddings.position_ids": np.arange(77)[None]}, path)
    with pytest.raises(InputError, match="contains no weights"):
        read_weights(COMPONENTS["text_encoder"], path)


HUB_FILES = [
    *(
        "README.md",
        "model_index.json",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
    ),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model.bin"),
    *("text_encoder/model.fp16.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("tokenizer/merges.txt.bak", "unet/config.json", f"unet/{UNET}.fp16.safetensors"),
    *(f"unet/{UNET}.safetensors.index.json", f"unet/{UNET}-00001-of-00001.safetensors"),
    *("vae/config.json", f"vae/{UNET}.safetensors", f"vae/{UNET}.msgpack"),
    *("safety_checker/config.json", "safety_checker/model.safetensors", f"../{UNET}.safetensors"),
    *("unet/../../.bashrc", f"unet/../{UNET}-00001-of-00001.safetensors"),
]
ALWAYS = {
    *("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "vae/config.json"),
    f"vae/{UNET}.safetensors",
}


def test_only_the_needed_files_are_fetched(tmp_path):
    full = wanted_files(HUB_FILES, None, "owner/name", COMPONENTS)
    assert set(full) == ALWAYS | {
        "text_encoder/model.safetensors",
        f"unet/{UNET}.safetensors.index.json",
        f"unet/{UNET}-00001-of-00001.safetensors",
    }
    half = wanted_files(HUB_FILES, "fp16", "owner/name", COMPONENTS)
    assert set(half) == ALWAYS | {
        "text_encoder/model.fp16.safetensors",
        f"unet/{UNET}.fp16.safetensors",
    }


def test_nothing_is_fetched_from_an_unreadable_checkpoint():
    names = [name for name in HUB_FILES if not name.startswith("unet/diff")] + ["unet/model.bin"]
    with pytest.raises(InputError, match=r"owner/name/unet contains model\.bin"):
        wanted_files(names, None, "owner/name", COMPONENTS)
