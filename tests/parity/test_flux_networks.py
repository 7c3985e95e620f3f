"""With the same random weights, the denoisers of FLUX.1 and FLUX.2 give diffusers' outputs."""

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import InputError
from jaxdiff.models import flux, flux2
from jaxdiff.weights.load import abstract_network, file_shapes, load_params, places

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import networks  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_fast")

NETWORKS = {
    "FluxTransformer2DModel": (flux.FluxTransformer2DModel, flux.FluxConfig),
    "Flux2Transformer2DModel": (flux2.Flux2Transformer2DModel, flux2.Flux2Config),
}
# The files as on the Hub, including private keys.
DEV = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SCHNELL = DEV | {"guidance_embeds": False}
KLEIN_4B = {
    "_class_name": "Flux2Transformer2DModel",
    "_diffusers_version": "0.37.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
KLEIN_9B = KLEIN_4B | {
    "joint_attention_dim": 12288,
    "num_attention_heads": 32,
    "num_layers": 8,
    "num_single_layers": 24,
}
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2, "in_channels": 16}
SMALL |= {"num_single_layers": 2, "joint_attention_dim": 24}
SMALL_DEV = DEV | SMALL | {"pooled_projection_dim": 20, "axes_dims_rope": [4, 6, 6]}
SMALL_KLEIN = KLEIN_4B | SMALL | {"axes_dims_rope": [4] * 4, "timestep_guidance_channels": 32}
VARIANTS = {
    "dev": SMALL_DEV,
    "schnell": SMALL_DEV | {"guidance_embeds": False},
    "more channels in than out": SMALL_DEV | {"in_channels": 32, "out_channels": 16},
    "klein": SMALL_KLEIN,
    "FLUX.2 dev": SMALL_KLEIN | {"guidance_embeds": True, "mlp_ratio": 2.5, "rope_theta": 100},
}


def inputs(config: dict) -> dict[str, np.ndarray]:
    """Two images of which nothing is alike; their sizes are not square."""
    is_first = config["_class_name"] == "FluxTransformer2DModel"
    channels = config["in_channels"] // 4 if is_first else config["in_channels"]
    found = {
        "latents": networks.drawn("latents", (2, 8, 12, channels)),
        "timesteps": np.array([875, 437.5], np.float32),  # exact also when divided by 1000
        "context": networks.drawn("context", (2, 7, config["joint_attention_dim"])),
    }
    if is_first:
        found["pooled"] = networks.drawn("pooled", (2, config["pooled_projection_dim"]))
    if config["guidance_embeds"]:
        found["guidance_scale"] = np.array([3.5, 1.25], np.float32)
    return found


def opened(config: dict, dtype=np.float32, **options) -> tuple[nnx.GraphDef, dict]:
    """Our network of a parsed config, with the weights of `networks.weight`."""
    network, config_class = NETWORKS[config["_class_name"]]
    graph, shapes = abstract_network(partial(network, **options), config_class.from_json(config))
    tensors = {
        key: SimpleNamespace(shape=shape, read=partial(networks.weight, key, shape))
        for key, shape in file_shapes(shapes).items()
    }
    return graph, load_params(places(shapes, dtype), tensors)


def compiled(config: dict, dtype=np.float32) -> Callable[..., jax.Array]:
    graph, params = opened(config, dtype)

    @jax.jit
    def run(params, arrays):
        timesteps = arrays.pop("timesteps")
        return nnx.merge(graph, params)(arrays.pop("latents"), timesteps, **arrays)

    return lambda arrays: run(params, dict(arrays))


def reference(config: dict, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What diffusers makes of the same weights and inputs, which it packs as its pipelines do."""
    network = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    weights = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(
        {key: torch.tensor(networks.weight(key, shape)) for key, shape in weights.items()}
    )
    given = {name: torch.tensor(array) for name, array in arrays.items()}
    latents, context = given["latents"].permute(0, 3, 1, 2), given["context"]
    conditions = {
        "encoder_hidden_states": context,
        "timestep": given["timesteps"] / 1000,
        "guidance": given.get("guidance_scale"),
    }
    batch, channels, height, width = latents.shape
    with torch.no_grad():
        if "pooled" in given:
            pipeline = diffusers.FluxPipeline
            ids = pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, "cpu", torch.float32
            )
            tokens = network(
                pipeline._pack_latents(latents, batch, channels, height, width),
                pooled_projections=given["pooled"],
                img_ids=ids,
                txt_ids=torch.zeros(context.shape[1], 3),
                **conditions,
            ).sample
            output = pipeline._unpack_latents(tokens, height, width, 1)
        else:
            pipeline = diffusers.Flux2KleinPipeline
            ids = pipeline._prepare_latent_ids(latents)
            tokens = network(
                pipeline._pack_latents(latents),
                img_ids=ids,
                txt_ids=pipeline._prepare_text_ids(context),
                **conditions,
            ).sample
            output = pipeline._unpack_latents_with_ids(tokens, ids)
    return output.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_match_diffusers(variant):
    config = VARIANTS[variant]
    arrays = inputs(config)
    ours = compiled(config)(arrays)
    assert networks.difference(ours, reference(config, arrays)) <= networks.BOUND


@pytest.mark.parametrize("variant", ["dev", "klein"])
def test_an_image_does_not_depend_on_its_neighbours(variant):
    config = VARIANTS[variant]
    arrays = inputs(config)
    others = {name: array.copy() for name, array in arrays.items()}
    for name, array in others.items():
        array[1] = networks.drawn(f"other {name}", array.shape[1:])
    run = compiled(config)
    before, after = run(arrays), run(others)
    np.testing.assert_array_equal(before[0], after[0])
    assert networks.difference(before[1], np.asarray(after[1])) > 0.01


@pytest.mark.parametrize("variant", ["dev", "klein"])
def test_bfloat16_gives_nearly_the_same(variant):
    config = VARIANTS[variant]
    arrays = inputs(config)
    exact = np.asarray(compiled(config)(arrays))
    numbers = {"timesteps", "guidance_scale"}
    half = {name: arrays[name].astype(jnp.bfloat16) for name in arrays.keys() - numbers}
    ours = compiled(config, jnp.bfloat16)(arrays | half)
    assert ours.dtype == jnp.bfloat16
    assert networks.difference(ours.astype(np.float32), exact) <= 0.05


@pytest.mark.parametrize("variant", ["dev", "klein"])
def test_recomputed_activations_give_the_same_gradients(variant):
    config = VARIANTS[variant] | {"num_layers": 1, "num_single_layers": 1}
    arrays = inputs(config)

    def gradients(remat: bool) -> dict:
        graph, params = opened(config, remat=remat)

        def loss(params):
            return (nnx.merge(graph, params)(**arrays) ** 2).mean()

        traced = jax.jit(jax.grad(loss)).trace(params)
        assert ("remat" in str(traced.jaxpr)) == remat
        return traced.lower().compile()(params)

    plain, recomputed = gradients(False), gradients(True)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), recomputed, plain)


@pytest.mark.parametrize(
    ("config", "count", "millions"),
    [
        (DEV, 1160, 11901.41),
        (SCHNELL, 1156, 11891.18),
        (KLEIN_4B, 169, 3875.54),
        (KLEIN_9B, 233, 9078.58),
    ],
    ids=["dev", "schnell", "klein 4B", "klein 9B"],
)
def test_the_keys_at_full_size_match_diffusers(config, count, millions):
    network, config_class = NETWORKS[config["_class_name"]]
    read = config_class.from_json(config)
    shapes = abstract_network(network, read)[1]
    ours = file_shapes(shapes)
    with torch.device("meta"):
        theirs = getattr(diffusers, config["_class_name"]).from_config(config).state_dict()
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    sizes = {key: np.prod(shape) for key, shape in ours.items()}
    assert len(ours) == count
    assert round(sum(sizes.values()) / 1e6, 2) == millions
    written = config | read.to_json()
    assert {key: written[key] for key in config} == config

    rules = (flux if network is flux.FluxTransformer2DModel else flux2).SHARDING
    whole = [
        key
        for key, size in sizes.items()
        if size > 0.01 * sum(sizes.values())
        and not any(re.search(rule, key.replace("weight", "kernel")) for rule, _ in rules)
    ]
    assert whole == []  # a mesh copies only small weights to every device


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DEV | {"patch_size": 2}, "patch_size = 2 is not supported (only 1 is)"),
        (DEV | {"axes_dims_rope": [16, 56, 48]}, "must add up to attention_head_dim = 128"),
        (DEV | {"axes_dims_rope": [15, 57, 56]}, "must be 3 even numbers"),
        (DEV | {"in_channels": 66}, "in_channels = 66 is not a multiple of 4"),
        (DEV | {"qk_norm": "layer_norm"}, "the key qk_norm = 'layer_norm' is not supported"),
        (KLEIN_4B | {"eps": 1e-05}, "eps = 1e-05 is not supported (only 1e-06 is)"),
        (KLEIN_4B | {"axes_dims_rope": [64, 64]}, "must be 4 even numbers"),
    ],
)
def test_other_configs_are_refused(config, message):
    with pytest.raises(InputError) as caught:
        NETWORKS[config["_class_name"]][1].from_json(config)
    assert str(caught.value).startswith("transformer/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "guidance", "message"),
    [
        ("dev", None, "guidance_scale is missing"),
        ("klein", np.ones(2, np.float32), "guidance_scale must be None"),
    ],
)
def test_a_guidance_scale_is_given_exactly_where_it_is_taken(variant, guidance, message):
    config = VARIANTS[variant]
    network = nnx.merge(*opened(config))
    with pytest.raises(ValueError, match=message):
        network(**inputs(config) | {"guidance_scale": guidance})
