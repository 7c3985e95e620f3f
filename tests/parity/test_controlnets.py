"""With the same random weights, ControlNets and the U-Nets that they steer equal diffusers'."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.checkpoint.controlnet import open_controlnet
from jaxdiff.devices import compilation, parallel
from jaxdiff.errors import InputError
from jaxdiff.models.controlnet import SHARDING, ControlNetConfig, ControlNetModel
from jaxdiff.weights.load import file_shapes, open_network
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
import networks  # noqa: E402
from test_full_size import UNET_15, UNET_21, UNET_XL  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

XL = families.shallow(families.UNET_XL)
UNETS = {
    "SD 1.5": (families.shallow(families.UNET), (8, 8)),
    "SD 2.1": (families.UNET_2 | {"upcast_attention": True}, (5, 11)),  # odd at every depth
    "XL": (XL, (6, 10)),
    "two layers a block": (XL | {"layers_per_block": 2, "norm_eps": 1e-3}, (7, 4)),
}
FACTOR = 8  # pixels per latent


def drawn(network, name: str):
    """The network with weights of `networks.weight`, zero convolutions included."""
    weights = network.state_dict()
    for key, value in weights.items():
        weights[key] = torch.tensor(networks.weight(f"{name}.{key}", tuple(value.shape)))
    network.load_state_dict(weights)
    return network.eval()


def unet_of(variant: str):
    return drawn(diffusers.UNet2DConditionModel(**UNETS[variant][0]), "unet")


def controlnet_of(variant: str, name: str = "one", **config):
    """diffusers' ControlNet for the U-Net of a variant; the config's values replace its own."""
    whole = diffusers.ControlNetModel.from_unet(unet_of(variant), load_weights_from_unet=False)
    public = {key: value for key, value in whole.config.items() if not key.startswith("_")}
    return drawn(diffusers.ControlNetModel(**public | config), name)


def inputs_of(variant: str) -> dict[str, np.ndarray]:
    unet, size = UNETS[variant]
    return networks.inputs("unet", {"in_channels": 4, **unet}, size)


def image(name: str, variant: str, channels: int = 3) -> np.ndarray:
    """A control image of the variant's size: noise in 0 to 1."""
    height, width = (FACTOR * side for side in UNETS[variant][1])
    numbers = np.random.default_rng(len(name)).random((2, height, width, channels))
    return numbers.astype(np.float32)


def opened(folder, dtype=np.float32):
    """Our ControlNet from a folder: its graph and its parameters."""
    files = open_controlnet(str(folder))
    config = ControlNetConfig.from_json(files.config)
    graph, shapes = abstract_network(ControlNetModel, config)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), parallel.AXES)
    return graph, open_network(shapes, SHARDING, files.tensors, dtype, mesh).load()


def load(network, folder):
    """Our ControlNet with the weights of diffusers', by way of its files."""
    network.save_pretrained(folder)
    graph, params = opened(folder)
    run = compilation.jit(lambda params, arrays: nnx.merge(graph, params)(**arrays))
    return lambda **arrays: run(params, arrays)


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def reference(network, inputs: dict[str, np.ndarray], **arguments):
    """What one of diffusers' networks makes of the inputs of a U-Net."""
    given = {name: torch.tensor(array) for name, array in inputs.items()}
    if "pooled" in given:
        names = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        arguments["added_cond_kwargs"] = names
    latents = nchw(inputs["latents"])
    with torch.no_grad():
        return network(
            latents, given["timesteps"], given["context"], **arguments, return_dict=False
        )


def reference_residuals(network, inputs, control, **arguments):
    control = [nchw(each) for each in control] if isinstance(control, list) else nchw(control)
    down, mid = reference(network, inputs, controlnet_cond=control, **arguments)
    return [nhwc(each) for each in down], nhwc(mid)


def reference_output(unet, inputs, residuals) -> np.ndarray:
    down, mid = residuals
    (output,) = reference(
        unet,
        inputs,
        down_block_additional_residuals=[nchw(each) for each in down],
        mid_block_additional_residual=nchw(mid),
    )
    return nhwc(output)


def check_residuals(ours, theirs):
    """Compares each residual with diffusers'."""
    (down, mid), (expected, expected_mid) = ours, theirs
    assert len(down) == len(expected)
    for residual, wanted in zip([*down, mid], [*expected, expected_mid], strict=True):
        assert residual.dtype == np.float32
        assert networks.difference(residual, wanted) <= networks.BOUND


def load_unet(unet, folder):
    unet.save_pretrained(folder)
    return networks.load("unet", folder)


@pytest.mark.parametrize("variant", UNETS)
def test_the_residuals_and_the_steered_output(variant, tmp_path):
    unet, theirs = unet_of(variant), controlnet_of(variant)
    inputs, control = inputs_of(variant), image("edges", variant)
    expected = reference_residuals(theirs, inputs, control)
    residuals = load(theirs, tmp_path / "controlnet")(**inputs, control=control)
    check_residuals(residuals, expected)

    steered = reference_output(unet, inputs, expected)
    output = load_unet(unet, tmp_path / "unet")(**inputs, residuals=residuals)
    assert networks.difference(output, steered) <= networks.BOUND
    (plain,) = reference(unet, inputs)
    assert networks.difference(nhwc(plain), steered) > 0.01


def test_residuals_averaged_over_space_steer_every_position_alike(tmp_path):
    variant = "SD 1.5"
    unet, theirs = unet_of(variant), controlnet_of(variant, global_pool_conditions=True)
    inputs, control = inputs_of(variant), image("shuffled", variant)
    expected = reference_residuals(theirs, inputs, control)
    residuals = load(theirs, tmp_path / "controlnet")(**inputs, control=control)
    assert {residual.shape[:3] for residual in jax.tree.leaves(residuals)} == {(2, 1, 1)}
    check_residuals(residuals, expected)
    output = load_unet(unet, tmp_path / "unet")(**inputs, residuals=residuals)
    assert networks.difference(output, reference_output(unet, inputs, expected)) <= networks.BOUND


OTHERS = {
    "blue first": ({"controlnet_conditioning_channel_order": "bgr"}, 3),
    "six channels, other widths": (
        {"conditioning_channels": 6, "conditioning_embedding_out_channels": [4, 8, 12, 20]},
        6,
    ),
    "fewer transformers": (
        {"mid_block_type": "UNetMidBlock2D", "down_block_types": ["DownBlock2D"] * 4},
        3,
    ),
    "other sinusoids": ({"flip_sin_to_cos": False, "freq_shift": 1}, 3),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_configs(other, tmp_path):
    config, channels = OTHERS[other]
    variant = "SD 2.1"
    theirs = controlnet_of(variant, **config)
    inputs, control = inputs_of(variant), image("edges", variant, channels)
    expected = reference_residuals(theirs, inputs, control)
    check_residuals(load(theirs, tmp_path)(**inputs, control=control), expected)


def test_reused_deep_features_keep_the_residuals_of_their_evaluation(tmp_path):
    """Compares DeepCache with diffusers' network, in which a hook reuses the features.

    The skip of the last layer has the residual of its own evaluation.
    """
    variant = "two layers a block"
    unet, theirs = unet_of(variant), controlnet_of(variant)
    control, before = image("edges", variant), inputs_of(variant)
    after = before | {
        "latents": networks.drawn("later", before["latents"].shape),
        "timesteps": before["timesteps"] - 17,
    }
    first, second = (reference_residuals(theirs, each, control) for each in (before, after))
    ours = load_unet(unet, tmp_path)
    whole, deep = ours(**before, residuals=first, method="evaluate")
    spared, same = ours(**after, residuals=second, deep=deep, method="evaluate")
    np.testing.assert_array_equal(same, deep)

    last, seen = unet.up_blocks[-1].resnets[-1], []

    def keep(_, arguments):  # the features come before the skip
        seen.append(arguments[0][:, : deep.shape[-1]])
        return (torch.cat([seen[0], arguments[0][:, deep.shape[-1] :]], dim=1), *arguments[1:])

    last.register_forward_pre_hook(keep)
    for inputs, residuals, output in ((before, first, whole), (after, second, spared)):
        expected = reference_output(unet, inputs, residuals)
        assert networks.difference(output, expected) <= networks.BOUND
    stale, _ = ours(**after, residuals=first, deep=deep, method="evaluate")
    assert networks.difference(stale, np.asarray(spared)) > 0.01


def test_bfloat16(tmp_path):
    """The control image stays float32, the residuals do not."""
    variant = "XL"
    theirs = controlnet_of(variant)
    inputs, control = inputs_of(variant), image("edges", variant)
    down, mid = load(theirs, tmp_path)(**inputs, control=control)
    graph, params = opened(tmp_path, jnp.bfloat16)
    halved = {name: inputs[name].astype(jnp.bfloat16) for name in ("latents", "context", "pooled")}
    run = compilation.jit(lambda params, arrays: nnx.merge(graph, params)(**arrays))
    half, half_mid = run(params, inputs | halved | {"control": control})
    for ours, exact in zip([*half, half_mid], [*down, mid], strict=True):
        assert ours.dtype == jnp.bfloat16
        assert networks.difference(ours.astype(np.float32), np.asarray(exact)) <= 0.05


FULL_SIZE = {
    "SD 1.5": (UNET_15, 340, 361.28),
    "SD 2.1": (UNET_21, 340, 364.23),
    "XL": (UNET_XL, 844, 1251.01),
}


@pytest.mark.parametrize("variant", FULL_SIZE)
def test_the_keys_match_diffusers_at_full_size(variant):
    unet, count, millions = FULL_SIZE[variant]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(unet)
        theirs = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    config = json.loads(theirs.to_json_string())
    read = ControlNetConfig.from_json(config)
    _, shapes = abstract_network(ControlNetModel, read)
    ours = file_shapes(shapes)
    assert ours == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert len(ours) == count
    assert round(sum(map(math.prod, ours.values())) / 1e6, 2) == millions

    written = read.to_json()
    assert ControlNetConfig.from_json(written) == read
    shared = written.keys() & config.keys()
    assert {key: written[key] for key in shared} == {key: config[key] for key in shared}
    assert written.keys() <= config.keys()

    mesh = jax.sharding.AbstractMesh((1, 4), parallel.AXES)  # a quarter of the weights for each
    splits = parallel.parameter_shardings(mesh, shapes, SHARDING)
    held = jax.tree.map(
        lambda leaf, split: math.prod(split.shard_shape(leaf.shape)), shapes, splits
    )
    assert sum(jax.tree.leaves(held)) <= 0.27e6 * millions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "ControlNetUnionModel"),
        ("controlnet_conditioning_channel_order", "grb"),
        ("conditioning_embedding_out_channels", []),
        ("conditioning_embedding_out_channels", None),
        ("conditioning_channels", 0),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("num_control_type", 6),
        ("class_embed_type", "timestep"),
        ("encoder_hid_dim", 4096),
        ("addition_embed_type", "text"),
        ("norm_num_groups", None),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("down_block_types", ["DownBlock2D"]),
    ],
)
def test_configs_that_are_not_supported_are_refused(key, value):
    with pytest.raises(InputError, match=f"^controlnet/config.json: [^\n]*{key}[^\n]*$"):
        ControlNetConfig.from_json({key: value})
