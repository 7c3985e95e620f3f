"""Transformers in GGUF files: blocks are restored, and what cannot be read is one line."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from small_flux import LAYER, original, save_base, transformer

import jaxdiff
from jaxdiff import cli
from jaxdiff.checkpoint.gguf_file import read_tensors
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint
from jaxdiff.request import Request

KINDS = gguf.GGMLQuantizationType


def write(path: Path, weights: dict, kinds: dict) -> Path:
    """Writes tensors to a GGUF file; `kinds` maps starts of keys to types, others are F32."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, tensor in weights.items():
        kind = next((kind for start, kind in kinds.items() if key.startswith(start)), KINDS.F32)
        if tensor.ndim < 2 or kind == KINDS.F32:
            writer.add_tensor(key, tensor)
        elif tensor.dtype == np.uint8:
            writer.add_tensor(key, tensor, raw_dtype=kind)
        else:
            writer.add_tensor(key, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return original(transformer())


def refusal(model: Path, base: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(model, base=base)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path, tensors) -> Path:
    kinds = {"double_blocks": KINDS.Q8_0, "single_blocks": KINDS.BF16, "txt_in": KINDS.F16}
    return write(tmp_path / "flux1-dev-Q8_0.gguf", tensors, kinds)


def test_blocks_are_restored(file, base, tensors):
    weights, state = open_checkpoint(file, base=base).weights("transformer"), transformer()
    original = {
        key: gguf.quants.dequantize(gguf.quants.quantize(tensor, KINDS.Q8_0), KINDS.Q8_0)
        if key.startswith("double_blocks") and tensor.ndim > 1
        else tensor
        for key, tensor in tensors.items()
    }
    fused = f"{LAYER}.weight"
    third = len(original[fused]) // 3
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        key = f"transformer_blocks.0.attn.{name}.weight"
        part = original[fused][place * third : (place + 1) * third]
        np.testing.assert_array_equal(weights[key].read(), part)
        assert 0 < np.abs(part - state[key]).max() < 0.05
    single = weights["single_transformer_blocks.0.proj_out.weight"].read()
    assert single.dtype.name == "bfloat16"
    assert weights.keys() == state.keys()


def test_types_that_the_library_restores_are_read(tmp_path):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (8, 2 * 144), np.uint8)
    for block in (0, 144):  # the scales, half-precision numbers, come first
        blocks[:, block : block + 4] = np.array([0.1, 0.2], np.float16).view(np.uint8)
    path = write(tmp_path / "a.gguf", {"a": blocks}, {"a": KINDS.Q4_K})
    (found,) = read_tensors(path).values()
    assert (found.shape, found.dtype) == ((8, 512), "Q4_K")
    np.testing.assert_array_equal(found.read(), gguf.quants.dequantize(blocks, KINDS.Q4_K))
    np.testing.assert_array_equal(found.rows(2, 5).read(), found.read()[2:5])
    with pytest.raises(ValueError, match="cannot cut a block"):
        found.reshape(8 * 512).rows(100, 200)


@pytest.mark.usefixtures("compiled_faster")
def test_a_gguf_model_makes_images(file, base):
    request = Request(prompt="a", steps=1, width=32, height=32)
    (image,) = jaxdiff.load(file, base=base, weights="int8").generate([request])
    assert image.finite


def test_what_cannot_be_read_is_one_line(file, base, tmp_path, tensors, capsys):
    content = file.read_bytes()
    short = tmp_path / "short.gguf"
    for end in (3, 300, len(content) - 1):
        short.write_bytes(content[:end])
        assert f"{short} is no whole GGUF file" in refusal(short, base)
    short.write_bytes(b"GGUF" + bytes(200))
    assert "is no whole GGUF file" in refusal(short, base)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(LAYER)}
    missing = write(tmp_path / "missing.gguf", rest, {})
    assert f"2 missing ({LAYER}.bias, {LAYER}.weight)" in refusal(missing, base)
    other = write(tmp_path / "other.gguf", {"blk.0.attn_q.weight": np.ones((4, 32), "f4")}, {})
    assert "is not a GGUF file of a supported transformer" in refusal(other, base)
    assert "FLUX.1 dev without text_encoder" in refusal(file)
    manifest = tmp_path / "a.txt"
    manifest.write_text("a\n")
    arguments = ["generate", f"--manifest={manifest}", f"--output={tmp_path / 'out'}"]
    assert cli.main([*arguments, f"--model={short}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_blocks_that_cannot_be_restored_are_named(tmp_path):
    path = write(tmp_path / "a.gguf", {"a": np.zeros((4, 292), np.uint8)}, {"a": KINDS.Q8_K})
    assert "a is stored as Q8_K, which cannot be restored" in refusal(path)


def test_a_damaged_file_is_one_line_or_a_model(file, base, tmp_path):
    random = np.random.default_rng(0)
    content, damaged, messages = file.read_bytes(), tmp_path / "damaged.gguf", []
    for _ in range(40):
        changed = bytearray(content)
        for place in random.integers(0, 4000, 3):  # mostly of the header
            changed[place] = random.choice([0, 255, random.integers(256)])
        damaged.write_bytes(changed)
        try:
            open_checkpoint(damaged, base=base)
        except InputError as problem:
            messages.append(str(problem))
    assert len(messages) > 20
    assert not [message for message in messages if "\n" in message]
