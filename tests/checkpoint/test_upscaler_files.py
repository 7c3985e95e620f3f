"""GAN upscalers are recognised by their keys alone; what cannot be used is named in one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_upscalers import write_rrdb, write_srvgg

from jaxdiff.checkpoint.upscaler import NETWORK
from jaxdiff.errors import InputError
from jaxdiff.families import open_checkpoint


def config(path: Path) -> dict:
    return open_checkpoint(path).config(NETWORK)


def edited(path: Path, change: Callable[[dict], dict]) -> Path:
    """Replaces the weights of a file, by their keys, with what `change` makes of them."""
    save_file(change(load_file(path)), path)
    return path


def without(*starts: str) -> Callable[[dict], dict]:
    return lambda weights: {k: w for k, w in weights.items() if not k.startswith(starts)}


def renamed(old: str, new: str) -> Callable[[dict], dict]:
    return lambda weights: {k.replace(old, new): w for k, w in weights.items()}


def with_shape(key: str, *shape: int) -> Callable[[dict], dict]:
    return lambda weights: weights | {key: np.zeros(shape, np.float32)}


@pytest.mark.parametrize("scale", [4, 2, 1])
def test_an_rrdbnet_is_recognised(scale, tmp_path):
    path = write_rrdb(tmp_path / "x.safetensors", scale)
    blocks = {"features": 8, "growth": 4, "blocks": 2}
    assert config(path) == {"_class_name": "RRDBNet", **blocks, "scale": scale}
    opened = open_checkpoint(path)
    assert opened.defaults.name == "RRDBNet upscaler"
    assert opened.defaults.factor == scale
    assert opened.weights(NETWORK).keys() == load_file(path).keys()


@pytest.mark.parametrize("scale", [2, 4])
def test_a_compact_network_is_recognised(scale, tmp_path):
    path = write_srvgg(tmp_path / "x.safetensors", scale)
    sizes = {"features": 8, "convs": 2, "scale": scale}
    assert config(path) == {"_class_name": "SRVGGNetCompact", **sizes}


@pytest.mark.parametrize("write", [write_rrdb, write_srvgg])
@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_weights_may_be_of_another_kind(write, kind, tmp_path):
    path = write(tmp_path / "x.safetensors")
    said = config(path)
    edited(path, lambda weights: {key: w.astype(kind) for key, w in weights.items()})
    assert config(path) == said


def test_equal_networks_have_other_fingerprints_if_their_weights_differ(tmp_path):
    paths = [write_srvgg(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    first, second = (open_checkpoint(path).fingerprint for path in paths)
    assert first != second


CUT = "lacks some of its layers body.N; download the file again"


@pytest.mark.parametrize(
    ("write", "change", "reason"),
    [
        (write_rrdb, without("body.0.rdb2."), "10 missing"),
        (write_rrdb, renamed("body.1.", "body.5."), CUT),
        (write_rrdb, renamed("body.1.", "body.999999999."), CUT),
        (write_rrdb, with_shape("body.7.rdb1.conv1.weight", 4, 8, 3, 3), CUT),
        (write_rrdb, renamed("body.1.", "body.99999999999."), "unknown"),
        (write_rrdb, without("conv_last"), "2 missing (conv_last.bias, conv_last.weight)"),
        (write_rrdb, with_shape("conv_x.weight", 8), "1 unknown (conv_x.weight)"),
        (
            write_rrdb,
            with_shape("conv_hr.weight", 3, 8, 3, 3),
            "conv_hr.weight [3, 8, 3, 3] instead of [8, 8, 3, 3]",
        ),
        (write_rrdb, with_shape("conv_first.weight", 8), "conv_first.weight is not a convolution"),
        (
            write_rrdb,
            with_shape("conv_first.weight", 8, 1, 3, 3),
            "takes 1 channels; use an upscaler of RGB images, which takes 3, 12, 48",
        ),
        (write_rrdb, with_shape("conv_first.weight", 0, 3, 3, 3), "is not a convolution's"),
        (
            write_srvgg,
            without("body.1.", "body.3.", "body.5."),
            "does not say which activations it has; use one with PReLU",
        ),
        (write_srvgg, without("body.1."), CUT),
        (write_srvgg, renamed("body.6.", "body.60."), CUT),
        (write_srvgg, without("body.6."), "body.5.weight is not a convolution's"),
        (
            write_srvgg,
            with_shape("body.0.weight", 8, 1, 3, 3),
            "turns 1 channels into 12; use an upscaler of RGB images",
        ),
        (write_srvgg, with_shape("body.6.weight", 13, 8, 3, 3), "turns 3 channels into 13"),
        (write_srvgg, with_shape("body.6.weight", 4, 8, 3, 3), "turns 3 channels into 4"),
        (write_srvgg, with_shape("body.6.weight", 2, 8, 3, 3), "turns 3 channels into 2"),
        (
            write_srvgg,
            lambda weights: {key: w.astype(np.int32) for key, w in weights.items()},
            "is stored as I32; use a file whose weights",
        ),
    ],
)
def test_what_cannot_be_used_is_named(write, change, reason, tmp_path):
    from jaxdiff.engine.engine import load

    path = edited(write(tmp_path / "x.safetensors"), change)
    with pytest.raises(InputError) as caught:
        load(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "is not a safetensors file or is cut off"),
        (lambda content: content[:50], "is not a safetensors file or is cut off"),
        (lambda content: content[:-9], "copy it again"),
    ],
)
def test_a_file_that_is_cut_off_is_named(change, reason, tmp_path):
    path = write_rrdb(tmp_path / "x.safetensors")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=reason):
        open_checkpoint(path)


def test_other_files_are_no_upscalers(tmp_path):
    save_file({"a.weight": np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors is not a Stable Diffusion model"):
        open_checkpoint(tmp_path / "x.safetensors")
    (tmp_path / "x.pth").write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match=r"or an upscaler with PyTorch: python -c"):
        open_checkpoint(tmp_path / "x.pth")
