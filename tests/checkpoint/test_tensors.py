import os
from dataclasses import replace
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.checkpoint.scaled_weights import with_scales
from jaxdiff.checkpoint.tensors import Identity
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.errors import InputError
from jaxdiff.weights.load import load_params

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "matrix": RANDOM.standard_normal((6, 4)).astype(np.float32),
    "kernel": RANDOM.standard_normal((6, 4, 1, 1)).astype(np.float16),
    "brain": RANDOM.standard_normal((3, 2)).astype(ml_dtypes.bfloat16),
    "double": RANDOM.standard_normal(5),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "e4m3": RANDOM.standard_normal((6, 4)).astype(ml_dtypes.float8_e4m3fn),
    "e5m2": RANDOM.standard_normal((6, 4)).astype(ml_dtypes.float8_e5m2),
    "ids": np.arange(3),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    save_file(ARRAYS, path)
    return path


@pytest.fixture(scope="module")
def stored(path):
    return read_header(path)


@pytest.mark.parametrize("key", [key for key in ARRAYS if key != "ids"])
def test_saved_tensors_are_read_back(stored, key):
    array = stored[key].read()
    assert array.dtype == ARRAYS[key].dtype
    np.testing.assert_array_equal(array, ARRAYS[key])


def test_rows_shapes_and_transposes_match_numpy(stored):
    matrix, array = stored["matrix"], ARRAYS["matrix"]
    cases = {
        matrix.rows(2, 5): array[2:5],
        matrix.rows(2, 5).rows(1, 2): array[3:4],
        matrix.rows(4, 6).transpose(): array[4:6].T,
        matrix.transpose().transpose(): array,
        matrix.reshape(3, 8).rows(1, 3): array.reshape(3, 8)[1:3],
        stored["kernel"].reshape(6, 4).transpose(): ARRAYS["kernel"][:, :, 0, 0].T,
        stored["kernel"].transpose(): ARRAYS["kernel"].T,
        matrix.swap(): np.concatenate([array[3:], array[:3]]),
        matrix.rows(1, 5).swap(): array[[3, 4, 1, 2]],
        stored["e4m3"].rows(2, 5).transpose(): ARRAYS["e4m3"][2:5].T,
    }
    for tensor, expected in cases.items():
        assert tensor.shape == expected.shape
        assert tensor.size == expected.size
        np.testing.assert_array_equal(tensor.read(), expected)


def test_rows_and_shapes_out_of_range_are_rejected(stored):
    for wrong in (
        lambda: stored["matrix"].rows(5, 7),
        lambda: stored["matrix"].transpose().rows(0, 1),
        lambda: stored["matrix"].reshape(5, 5),
        lambda: stored["matrix"].rows(0, 3).swap(),
        lambda: stored["matrix"].swap().rows(0, 3),
        lambda: stored["matrix"].swap().reshape(24),
        lambda: stored["matrix"].swap().transpose(),
        lambda: stored["matrix"].transpose().swap(),
    ):
        with pytest.raises(ValueError, match="matrix"):
            wrong()


def test_integers_are_rejected_as_weights(stored):
    with pytest.raises(InputError, match="ids is stored as I64"):
        stored["ids"].read()


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    tensor = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"file\.safetensors was truncated"):
        tensor.read()
    path.unlink()
    with pytest.raises(InputError, match=r"file\.safetensors cannot be read"):
        tensor.read()


def test_a_left_out_identity_takes_updates():
    identity = Identity("a.safetensors", "projection", "F32", (3, 3), 0)
    np.testing.assert_array_equal(identity.read(), np.eye(3))
    update = SimpleNamespace(read=lambda: np.ones((3, 3), np.float32))
    np.testing.assert_array_equal(replace(identity, updates=(update,)).read(), np.eye(3) + 1)


LINEAR = RANDOM.standard_normal((4, 6)).astype(ml_dtypes.float8_e4m3fn)
SCALE = np.array(0.0123, np.float32)
PRODUCT = LINEAR.astype(np.float32) * SCALE


def text(said: str) -> np.ndarray:
    return np.frombuffer(said.encode(), np.uint8)


@pytest.fixture
def write(tmp_path):
    def write(**tensors):
        path = tmp_path / "file.safetensors"
        save_file({f"a.{name}": array for name, array in tensors.items()}, path)
        return path

    return write


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_is_multiplied_in_float32(write, name, shape):
    others = {"scale_input": np.ones((), np.float32), "input_scale": np.ones((), np.float32)}
    others |= {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn), "bias": np.zeros(4, np.float16)}
    others |= {"comfy_quant": text('{"format": "float8_e4m3fn"}')}
    path = write(weight=LINEAR, **{name: SCALE.reshape(shape)}, **others)
    found = with_scales(read_header(path))
    assert found.keys() == {"a.weight", "a.bias"}
    weight = found["a.weight"]
    assert weight.read().dtype == np.float32
    np.testing.assert_array_equal(weight.read(), PRODUCT)
    np.testing.assert_array_equal(weight.rows(1, 3).read(), PRODUCT[1:3])
    np.testing.assert_array_equal(weight.transpose().read(), PRODUCT.T)
    np.testing.assert_array_equal(weight.swap().read(), PRODUCT[[2, 3, 0, 1]])
    update = SimpleNamespace(read=lambda: np.ones((4, 6), np.float32))
    np.testing.assert_array_equal(replace(weight, updates=(update,)).read(), PRODUCT + 1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("stored", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_directorys_network_in_8_bits_is_loaded_in_any_dtype(write, dtype, is_scaled, stored):
    array = LINEAR.astype(np.float32).astype(stored)
    expected = array.astype(np.float32) * (SCALE if is_scaled else 1)
    path = write(weight=array, **({"weight_scale": SCALE} if is_scaled else {}))
    component = Component(library="diffusers", class_name="")
    place = jax.ShapeDtypeStruct((6, 4), dtype, sharding=None)
    params = load_params({"a": {"kernel": place}}, read_weights(component, path))
    np.testing.assert_array_equal(params["a"]["kernel"], expected.astype(dtype).T)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"scale_weight": np.ones(4, np.float32)},
            r"a\.scale_weight \[4\] of F32 is not one number",
        ),
        ({"weight_scale": np.ones((), np.int32)}, r"a\.weight_scale \[\] of I32 is not one number"),
        ({"scale_weight": np.array(np.nan, np.float32)}, r"a\.scale_weight = nan is not finite"),
        ({"weight_scale": np.array(np.inf, np.float32)}, r"a\.weight_scale = inf is not finite"),
        ({"scale_weight": SCALE, "weight_scale": SCALE}, r"a\.weight has two scales"),
        ({"comfy_quant": text('{"format": "nvfp4"}')}, r"a\.comfy_quant names a format"),
        (
            {"comfy_quant": text('{"format": "float8_e4m3fn", "rotation": 3}')},
            r"a\.comfy_quant names a format",
        ),
        ({"comfy_quant": text("[")}, r"a\.comfy_quant cannot be read"),
        ({"comfy_quant": text("[]")}, r"a\.comfy_quant cannot be read"),
        ({"comfy_quant": np.zeros(2000, np.uint8)}, r"a\.comfy_quant cannot be read"),
        ({"comfy_quant": np.zeros(3, np.float32)}, r"a\.comfy_quant cannot be read"),
    ],
)
def test_what_a_scale_cannot_be_is_named(write, tensors, message):
    path = write(weight=LINEAR, **tensors)
    with pytest.raises(InputError, match=rf"file\.safetensors: {message}"):
        with_scales(read_header(path))


def test_a_scale_without_a_weight_is_an_unknown_tensor(write):
    path = write(scale_weight=SCALE, bias=np.zeros(4, np.float16))
    assert with_scales(read_header(path)).keys() == {"a.scale_weight", "a.bias"}
