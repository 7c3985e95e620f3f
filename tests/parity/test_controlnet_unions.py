"""With the same random weights, union ControlNets equal diffusers'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.checkpoint.controlnet import open_controlnet
from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.models.controlnet_union import ControlNetUnionConfig, ControlNetUnionModel
from jaxdiff.weights.load import file_shapes, load_params, places
from jaxdiff.weights.network import abstract_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import families  # noqa: E402  (beside this file)
from test_controlnets import (  # noqa: E402
    UNET_XL,
    check_residuals,
    controlnet_of,
    drawn,
    image,
    inputs_of,
    reference_residuals,
)

pytestmark = pytest.mark.usefixtures("compiled_faster")

VARIANT, KINDS = "XL", 5
MODES = np.array([[3, 0], [1, 1]])  # of each row's two images
WEIGHTS = np.array([[0.4, 1.3], [1.1, 0.7]], np.float32)


def read(config: dict):
    """Our network of a parsed config: the config, the graph and the shapes."""
    ours = ControlNetUnionConfig.from_json(config)
    return ours, *abstract_network(ControlNetUnionModel, ours)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """diffusers' network, with two layers in its transformer, and ours from its files."""
    config = {
        "num_trans_layer": 2,
        "transformer_layers_per_block": 1,
        "conditioning_embedding_out_channels": (4, 4, 8, 8),
    }
    theirs = drawn(families.union_of(controlnet_of(VARIANT), KINDS, **config), "union")
    folder = tmp_path_factory.mktemp("net")
    theirs.save_pretrained(folder)
    files = open_controlnet(str(folder))
    _, graph, shapes = read(files.config)

    @compilation.jit
    def run(params, arrays):
        return nnx.merge(graph, params)(**arrays)

    params = load_params(places(shapes, np.float32), files.tensors)
    return theirs, lambda arrays: run(params, arrays)


def arrays_of(images: int) -> dict[str, np.ndarray]:
    """Inputs of two rows with so many images."""
    control = [image(name, VARIANT) for name in ("edges", "depth")[:images]]
    given = {"modes": MODES[:, :images], "weights": WEIGHTS[:, :images]}
    return inputs_of(VARIANT) | {"control": np.stack(control, axis=1)} | given


def reference(theirs, arrays: dict[str, np.ndarray], row: int):
    """What diffusers' network makes of one row."""
    alone = {name: array[row : row + 1] for name, array in arrays.items()}
    control, modes, weights = (alone.pop(name) for name in ("control", "modes", "weights"))
    return reference_residuals(
        theirs,
        alone,
        [*np.moveaxis(control, 1, 0)],
        control_type=torch.eye(KINDS)[modes[0]].amax(dim=0)[None],
        control_type_idx=modes[0].tolist(),
        conditioning_scale=weights[0].tolist(),
    )


def test_the_residuals_of_each_row_are_those_of_the_row_alone(net):
    """diffusers' attention mixes the rows of a batch; its pipelines' rows have equal images."""
    theirs, ours = net
    arrays = arrays_of(images=2)
    found = ours(arrays)
    for row in (0, 1):
        alone = jax.tree.map(lambda residual, row=row: residual[row : row + 1], found)
        check_residuals(alone, reference(theirs, arrays, row))
    others = {name: array[[0, 0]] for name, array in arrays.items()}
    for before, after in zip(*map(jax.tree.leaves, (found, ours(others))), strict=True):
        np.testing.assert_array_equal(before[0], after[0])


def test_one_image_without_a_weight(net):
    theirs, ours = net
    arrays = arrays_of(images=1)
    arrays["weights"] = np.ones_like(arrays["weights"])
    found = jax.tree.map(lambda residual: residual[1:], ours(arrays))
    check_residuals(found, reference(theirs, arrays, row=1))


def test_weights_and_images_in_float32_do_not_change_the_dtype(net):
    theirs, _ = net
    arrays = arrays_of(images=2)
    halved = {name: arrays[name].astype(jnp.bfloat16) for name in ("latents", "context", "pooled")}
    _, graph, shapes = read(json.loads(theirs.to_json_string()))
    params = places(shapes, jnp.bfloat16)
    found = jax.eval_shape(
        lambda params, arrays: nnx.merge(graph, params)(**arrays), params, arrays | halved
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


def test_the_keys_match_diffusers_at_full_size():
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(UNET_XL)
        plain = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        theirs = families.union_of(plain, kinds=6)
    config = json.loads(theirs.to_json_string())
    ours, _, shapes = read(config)
    shapes = file_shapes(shapes)
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert ControlNetUnionConfig.from_json(ours.to_json()) == ours


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "ControlNetModel"),
        ("num_control_type", 0),
        ("num_proj_channel", 640),
        ("num_trans_channel", 64),
        ("addition_time_embed_dim", None),
    ],
)
def test_configs_that_are_not_supported_are_refused(key, value):
    config = {"addition_time_embed_dim": 256, key: value}
    with pytest.raises(InputError, match=f"^controlnet/config.json: [^\n]*{key}[^\n]*$"):
        ControlNetUnionConfig.from_json(config)
