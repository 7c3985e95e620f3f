import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.errors import InputError

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "matrix": RANDOM.standard_normal((6, 4)).astype(np.float32),
    "kernel": RANDOM.standard_normal((6, 4, 1, 1)).astype(np.float16),
    "brain": RANDOM.standard_normal((3, 2)).astype(ml_dtypes.bfloat16),
    "double": RANDOM.standard_normal(5),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
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
