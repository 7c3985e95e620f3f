"""GAN upscalers give the outputs of the same networks in PyTorch."""

import numpy as np
import pytest

import jaxdiff
from jaxdiff.checkpoint.checkpoint import BUNDLED

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402

from tools.bench.torch_upscalers import RRDBNet, SRVGGNetCompact  # noqa: E402

SIDES = 64, 96
# The names in ESRGAN's two older kinds of files, by parts of today's, in the order of their use.
OLDEST = (
    ("conv_body", "model.1.sub.2"),
    (".rdb", ".RDB"),
    ("conv_first", "model.0"),
    ("conv_last", "model.10"),
    ("conv_up1", "model.3"),
    ("conv_up2", "model.6"),
    ("conv_hr", "model.8"),
)
OLDER = (
    ("conv_body", "trunk_conv"),
    ("body", "RRDB_trunk"),
    (".rdb", ".RDB"),
    ("conv_up", "upconv"),
    ("conv_hr", "HRconv"),
)


def drawn(kind: type, **sizes) -> "torch.nn.Module":
    """Returns a network with random weights that makes images of some contrast."""
    torch.manual_seed(0)
    network = kind(**sizes).eval()
    with torch.no_grad():
        if kind is RRDBNet:
            network.conv_last.weight *= 30
            network.conv_last.bias.fill_(0.5)
        for layer in network.modules():
            if isinstance(layer, torch.nn.PReLU):
                layer.weight.uniform_(-0.5, 0.5)
    return network


def difference(path, network, record) -> float:
    """Returns the relative difference of an enlarged image before it is rounded."""
    model = jaxdiff.load(path)
    pixels = np.random.default_rng(0).integers(0, 256, (*SIDES, 3), np.uint8)
    arguments = model._upscaler._params, pixels[None]
    enlarged, _ = model._upscaler._enlarge.compile(*arguments).result()(*arguments)
    with torch.no_grad():
        seen = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        wanted = network(seen)[0].permute(1, 2, 0).clamp(0, 1).numpy()
    found = np.asarray(enlarged)[0] / 255
    relative = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    record("difference", f"{relative:.1e}")
    assert wanted.std() > 0.1  # not all black or white
    return relative


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *((RRDBNet, {"features": 16, "growth": 8, "blocks": 2, "scale": n}) for n in (4, 2, 1)),
        *((SRVGGNetCompact, {"features": 16, "convs": 4, "scale": n}) for n in (4, 3, 2)),
    ],
)
def test_networks_agree(kind, sizes, tmp_path, record_property):
    network, path = drawn(kind, **sizes), tmp_path / "x.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    assert difference(path, network, record_property) < 1e-4


@pytest.mark.parametrize("names", [OLDEST, OLDER])
def test_older_names_of_the_weights_are_read(names, tmp_path, record_property):
    network, path = drawn(RRDBNet, features=16, growth=8, blocks=2), tmp_path / "x.safetensors"
    weights = {}
    for key, weight in network.state_dict().items():
        if names is OLDEST and key.startswith("body."):
            layer, _, kind = f"model.1.sub.{key.removeprefix('body.')}".rpartition(".")
            key = f"{layer}.0.{kind}"
        for today, before in names:
            key = key.replace(today, before)
        weights[key] = weight
    safetensors.torch.save_file(weights, path)
    assert difference(path, network, record_property) < 1e-4


def test_the_bundled_upscaler_agrees(record_property):
    weights = safetensors.torch.load_file(BUNDLED["shapes64-x4"])
    features, convs = len(weights["body.0.weight"]), len(weights) // 3 - 1
    network = SRVGGNetCompact(features, convs, 4).eval()
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    assert difference("shapes64-x4", network, record_property) < 1e-4
