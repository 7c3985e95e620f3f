"""With the same random weights, the denoisers of FLUX.1 and FLUX.2 give diffusers' outputs."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import denoisers  # noqa: E402  (beside this file)
import networks  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

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


def reference(config: dict, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What diffusers makes of the same weights and inputs, which it packs as its pipelines do."""
    network = denoisers.reference(config)
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
    ours = denoisers.compiled(config)(arrays)
    assert networks.difference(ours, reference(config, arrays)) <= networks.BOUND


@pytest.mark.parametrize("variant", ["dev", "klein"])
def test_an_image_does_not_depend_on_its_neighbours(variant):
    denoisers.check_that_neighbours_do_not_matter(VARIANTS[variant], inputs(VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["dev", "klein"])
def test_bfloat16(variant):
    denoisers.check_bfloat16(VARIANTS[variant], inputs(VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["dev", "klein"])
def test_recomputed_activations_give_the_same_gradients(variant):
    config = VARIANTS[variant] | {"num_layers": 1, "num_single_layers": 1}
    gradients = denoisers.check_recomputed_gradients(config, inputs(config), blocks=2)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


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
def test_full_size(config, count, millions):
    shapes = denoisers.check_full_size(config, count)
    assert round(sum(map(np.prod, shapes.values())) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DEV | {"patch_size": 2}, r"patch_size = 2 is not supported \(only 1 is\)"),
        (DEV | {"axes_dims_rope": [16, 56, 48]}, "must add up to attention_head_dim = 128"),
        (DEV | {"axes_dims_rope": [15, 57, 56]}, "must be 3 even numbers"),
        (DEV | {"in_channels": 66}, "in_channels = 66 is not a multiple of 4"),
        (DEV | {"qk_norm": "layer_norm"}, "the key qk_norm = 'layer_norm' is not supported"),
        (KLEIN_4B | {"eps": 1e-05}, r"eps = 1e-05 is not supported \(only 1e-06 is\)"),
        (KLEIN_4B | {"axes_dims_rope": [64, 64]}, "must be 4 even numbers"),
    ],
)
def test_other_configs_are_refused(config, message):
    denoisers.check_refusal(config, message)


@pytest.mark.parametrize(
    ("variant", "guidance", "message"),
    [
        ("dev", None, "guidance_scale is missing"),
        ("klein", np.ones(2, np.float32), "guidance_scale must be None"),
    ],
)
def test_a_guidance_scale_is_given_exactly_where_it_is_taken(variant, guidance, message):
    config = VARIANTS[variant]
    network = nnx.merge(*denoisers.opened(config))
    with pytest.raises(ValueError, match=message):
        network(**inputs(config) | {"guidance_scale": guidance})
