"""With the same random weights, FLUX.1's ControlNets and the transformer that they steer equal
diffusers'.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.models.flux_controlnet import FluxControlNetConfig, spread

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import denoisers  # noqa: E402  (beside this file)
import networks  # noqa: E402
from test_flux_networks import SMALL_DEV, inputs  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

TRANSFORMER = SMALL_DEV | {"num_layers": 3, "num_single_layers": 5}
# As InstantX's, without private keys.
CANNY = {
    "_class_name": "FluxControlNetModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_mode": None,
    "num_single_layers": 10,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SMALL = TRANSFORMER | {"_class_name": "FluxControlNetModel", "num_layers": 2}
NETS = {
    "two double and two single blocks": SMALL | {"num_single_layers": 2},
    "no single blocks": SMALL | {"num_single_layers": 0},
    "no guidance": SMALL | {"num_single_layers": 1, "guidance_embeds": False},
    "union": SMALL | {"num_layers": 1, "num_single_layers": 1, "num_mode": 4},
}


def arrays_of(net: dict) -> dict[str, np.ndarray]:
    """The transformer's inputs, the control image's latents and, for a union net, its kind.

    A net may take no guidance.
    """
    found = inputs(TRANSFORMER)
    if not net["guidance_embeds"]:
        del found["guidance_scale"]
    if net.get("num_mode"):
        found["modes"] = np.array([3, 0])
    return found | {"control": networks.drawn("control", found["latents"].shape)}


def reference(config: dict, arrays: dict[str, np.ndarray], **given):
    """What diffusers' transformer or ControlNet makes of the same weights and inputs."""
    pipeline = diffusers.FluxPipeline
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}

    def packed(latents: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = latents.shape
        latents = latents.permute(0, 3, 1, 2)
        return pipeline._pack_latents(latents, batch, channels, height, width)

    if "control" in tensors:
        given["controlnet_cond"] = packed(tensors["control"])
    if "modes" in tensors:
        given["controlnet_mode"] = tensors["modes"][:, None]
    batch, height, width, _ = tensors["latents"].shape
    with torch.no_grad():
        return denoisers.reference(config)(
            packed(tensors["latents"]),
            encoder_hidden_states=tensors["context"],
            pooled_projections=tensors["pooled"],
            timestep=tensors["timesteps"] / 1000,
            guidance=tensors.get("guidance_scale"),
            img_ids=pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, "cpu", torch.float32
            ),
            txt_ids=torch.zeros(tensors["context"].shape[1], 3),
            return_dict=False,
            **given,
        )


@pytest.mark.parametrize("name", NETS)
def test_the_residuals_and_the_steered_output(name):
    net = NETS[name]
    arrays = arrays_of(net)
    expected = reference(net, arrays)
    double, single = denoisers.compiled(net)(arrays)
    theirs = [each for kind in expected for each in kind or ()]
    for ours, wanted in zip([*double, *single], theirs, strict=True):
        assert networks.difference(ours, wanted.numpy()) <= networks.BOUND

    arrays, run = inputs(TRANSFORMER), denoisers.compiled(TRANSFORMER)
    blocks = TRANSFORMER["num_layers"], TRANSFORMER["num_single_layers"]
    output = run(arrays | {"residuals": spread(double, single, blocks)})
    names = ("controlnet_block_samples", "controlnet_single_block_samples")
    (steered,) = reference(TRANSFORMER, arrays, **dict(zip(names, expected, strict=True)))
    height, width = (8 * side for side in arrays["latents"].shape[1:3])
    steered = diffusers.FluxPipeline._unpack_latents(steered, height, width, 8)
    steered = steered.permute(0, 2, 3, 1).numpy()
    assert networks.difference(output, steered) <= networks.BOUND
    assert networks.difference(run(arrays), steered) > 0.01


def test_an_image_does_not_depend_on_its_neighbours():
    net = NETS["two double and two single blocks"]
    arrays = arrays_of(net)
    others = {name: array[[0, 0]] for name, array in arrays.items()}
    run = denoisers.compiled(net)
    for before, after in zip(*map(jax.tree.leaves, (run(arrays), run(others))), strict=True):
        np.testing.assert_array_equal(before[0], after[0])
        assert networks.difference(before[1], after[1]) > 0.01


def test_bfloat16():
    net = NETS["no guidance"]
    arrays = arrays_of(net)
    exact = jax.tree.leaves(denoisers.compiled(net)(arrays))
    halved = ("latents", "context", "pooled", "control")
    arrays |= {name: arrays[name].astype(jnp.bfloat16) for name in halved}
    half = jax.tree.leaves(denoisers.compiled(net, jnp.bfloat16)(arrays))
    for ours, wanted in zip(half, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert networks.difference(ours.astype(np.float32), np.asarray(wanted)) <= 0.05


@pytest.mark.parametrize(
    ("config", "count", "millions"),
    [(CANNY, 348, 3301.93), (CANNY | {"num_layers": 6, "num_single_layers": 0}, 222, 2140.88)],
    ids=["InstantX's canny", "without single blocks"],
)
def test_the_keys_match_diffusers_at_full_size(config, count, millions):
    shapes = denoisers.check_full_size(config, count)
    assert round(sum(map(np.prod, shapes.values())) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "ControlNetModel"),
        ("patch_size", 2),
        ("num_mode", 0),
        ("conditioning_embedding_channels", 16),
        ("num_layers", 0),
        ("in_channels", 66),
    ],
)
def test_configs_that_are_not_supported_are_refused(key, value):
    with pytest.raises(InputError, match=f"^controlnet/config.json: [^\n]*{key}[^\n]*$"):
        FluxControlNetConfig.from_json({key: value})
