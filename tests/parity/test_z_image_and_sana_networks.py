"""With the same random weights, the denoisers of Z-Image and Sana give diffusers' output."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import InputError
from jaxdiff.models.sana import SanaConfig, SanaTransformer2DModel
from jaxdiff.models.z_image import ZImageConfig, ZImageTransformer2DModel
from jaxdiff.weights.load import abstract_network, file_shapes, load_params, places

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import networks  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_fast")

# As published, with the keys that newer versions write.
Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": "0.36.0.dev0",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "siglip_feat_dim": None,
    "t_scale": 1000.0,
}
SANA = {  # 1.6B
    "_class_name": "SanaTransformer2DModel",
    "_diffusers_version": "0.32.0.dev0",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "dropout": 0.0,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "in_channels": 32,
    "interpolation_scale": None,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
    "qk_norm": None,
    "sample_size": 32,
    "timestep_scale": 1.0,
}
SANA_SMALL = SANA | {  # 0.6B
    "cross_attention_dim": 1152,
    "cross_attention_head_dim": 72,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "num_layers": 28,
}
TINY = {
    "Z-Image": Z_IMAGE
    | {
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 32, 32],
        "cap_feat_dim": 24,
        "dim": 32,
        "in_channels": 4,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 1,
    },
    "Sana": SANA
    | {
        "attention_head_dim": 8,
        "caption_channels": 24,
        "cross_attention_dim": 32,
        "cross_attention_head_dim": 16,
        "in_channels": 4,
        "num_attention_heads": 4,
        "num_cross_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
    },
}
OURS = {
    "ZImageTransformer2DModel": (ZImageConfig, ZImageTransformer2DModel),
    "SanaTransformer2DModel": (SanaConfig, SanaTransformer2DModel),
}
LENGTHS = [5, 32, 40]  # of the texts, in tokens


def shapes_of(config: dict, **options) -> tuple[nnx.GraphDef, dict]:
    config_class, network_class = OURS[config["_class_name"]]
    return abstract_network(partial(network_class, **options), config_class.from_json(config))


def network(config: dict, dtype=np.float32, **options):
    """Our network as a function of its parameters and a dict of inputs, and its parameters."""
    graph, shapes = shapes_of(config, **options)
    tensors = {
        key: SimpleNamespace(shape=shape, read=partial(networks.weight, key, shape))
        for key, shape in file_shapes(shapes).items()
    }

    def run(params: dict, inputs: dict) -> jax.Array:
        return nnx.merge(graph, params)(**inputs)

    return run, load_params(places(shapes, dtype), tensors)


def outputs(config: dict, inputs: dict, **options) -> np.ndarray:
    run, params = network(config, **options)
    return np.asarray(jax.jit(run)(params, inputs))


def inputs(size: tuple[int, int] = (6, 10), tokens: int = 50) -> dict[str, np.ndarray]:
    """A batch of texts of different lengths; what follows a text is not zero."""
    context = networks.drawn("context", (len(LENGTHS), 128, 24))
    return {
        "latents": networks.drawn("latents", (len(LENGTHS), *size, 4)),
        "timesteps": np.array([1000.0, 857.143, 17.0], np.float32),
        "context": context[:, :tokens],
        "mask": np.arange(tokens) < np.array(LENGTHS)[:, None],
    }


def expected(config: dict, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The velocities by diffusers, one image at a time."""
    reference = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    reference.load_state_dict(
        {
            key: torch.tensor(networks.weight(key, tuple(value.shape)))
            for key, value in reference.state_dict().items()
        }
    )
    found = []
    for image in zip(*(torch.tensor(array) for array in inputs.values()), strict=True):
        latents, timestep, context, mask = image
        latents = latents.permute(2, 0, 1)
        with torch.no_grad():
            if isinstance(reference, diffusers.ZImageTransformer2DModel):
                time = (1000 - timestep[None]) / 1000
                (output,) = reference([latents[:, None]], time, [context[mask]]).sample
                output = -output[:, 0]  # of one frame
            else:
                (output,) = reference(
                    latents[None],
                    context[None],
                    timestep[None],
                    encoder_attention_mask=mask[None].float(),
                ).sample
        found.append(output.permute(1, 2, 0).numpy())
    return np.stack(found)


@pytest.mark.parametrize(
    ("family", "size"),
    [("Z-Image", (8, 16)), ("Z-Image", (6, 10)), ("Sana", (5, 8))],
    ids=["Z-Image of 32 patches", "Z-Image of 15 patches", "Sana"],
)
def test_outputs_are_those_of_diffusers(family, size):
    batch = inputs(size)
    ours, theirs = outputs(TINY[family], batch), expected(TINY[family], batch)
    for image, reference in zip(ours, theirs, strict=True):
        assert networks.difference(image, reference) <= networks.BOUND


@pytest.mark.parametrize("family", TINY)
def test_the_padding_of_a_text_does_not_change_its_image(family):
    short, long = (outputs(TINY[family], inputs(tokens=tokens)) for tokens in (40, 128))
    assert networks.difference(long, short) <= 1e-5


@pytest.mark.parametrize("family", TINY)
def test_an_image_does_not_depend_on_its_neighbours(family):
    run, params = network(TINY[family])
    run, batch = jax.jit(run), inputs()
    others = {
        "latents": np.concatenate([batch["latents"][:1], -batch["latents"][1:]]),
        "timesteps": np.array([1000.0, 3.0, 500.0], np.float32),
        "context": np.concatenate([batch["context"][:1], 2 * batch["context"][1:]]),
        "mask": batch["mask"][[0, 2, 0]],
    }
    one, other = np.asarray(run(params, batch)), np.asarray(run(params, others))
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1:] != other[1:]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("family", TINY)
def test_in_bfloat16(family):
    batch = inputs()
    half = batch | {name: batch[name].astype(jnp.bfloat16) for name in ("latents", "context")}
    ours = outputs(TINY[family], half, dtype=jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert networks.difference(ours.astype(np.float32), outputs(TINY[family], batch)) < 0.05


@pytest.mark.parametrize(
    "config",
    [TINY["Z-Image"] | {"n_layers": 1}, TINY["Sana"] | {"num_layers": 1}],
    ids=TINY,
)
def test_gradients_are_the_same_if_activations_are_recomputed(config):
    batch = inputs()
    gradients = {}
    for remat in (False, True):
        run, params = network(config, remat=remat)
        gradient = jax.grad(lambda params, run=run: (run(params, batch) ** 2).mean())
        assert bool(re.search("remat|checkpoint", str(jax.make_jaxpr(gradient)(params)))) == remat
        flat, _ = jax.flatten_util.ravel_pytree(jax.jit(gradient)(params))
        gradients[remat] = np.asarray(flat)
    assert networks.difference(gradients[True], gradients[False]) <= 1e-5


@pytest.mark.parametrize(
    ("config", "count"),
    [(Z_IMAGE, 521), (SANA, 396), (SANA_SMALL, 548)],
    ids=["Z-Image", "Sana 1.6B", "Sana 0.6B"],
)
def test_the_keys_at_full_size_are_those_of_diffusers(config, count):
    with torch.device("meta"):
        theirs = getattr(diffusers, config["_class_name"]).from_config(config).state_dict()
    ours = file_shapes(shapes_of(config)[1])
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    assert len(ours) == count


@pytest.mark.parametrize("family", TINY)
def test_diffusers_reads_the_config_that_we_write(family):
    network_class = getattr(diffusers, TINY[family]["_class_name"])
    written = OURS[TINY[family]["_class_name"]][0].from_json(TINY[family]).to_json()
    read, same = (network_class.from_config(each).config for each in (written, TINY[family]))
    assert all(read[key] == value for key, value in same.items() if not key.startswith("_"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Z_IMAGE | {"qk_norm": False}, r"qk_norm = False is not supported \(only True is\)"),
        (Z_IMAGE | {"siglip_feat_dim": 1152}, "the key siglip_feat_dim = 1152 is not supported"),
        (Z_IMAGE | {"axes_dims": [64, 64]}, "axes_dims must be 3 numbers"),
        (Z_IMAGE | {"axes_dims": [32, 47, 49]}, "axes_dims must be even"),
        (Z_IMAGE | {"dim": 2560}, "dim must be n_heads times the sum of axes_dims"),
        (SANA | {"guidance_embeds": True}, "the key guidance_embeds = True is not supported"),
        (SANA | {"qk_norm": "rms_norm_across_heads"}, "the key qk_norm = .* is not supported"),
        (SANA | {"patch_size": 2}, r"patch_size = 2 is not supported \(only 1 is\)"),
        (SANA | {"num_cross_attention_heads": 16}, "must have the same width in all"),
        (SANA | {"cross_attention_dim": 2304}, "cross_attention_dim must be .* 2240"),
    ],
)
def test_other_configs_are_refused(config, message):
    with pytest.raises(InputError, match=f"^transformer/config.json: .*{message}[^\n]*$"):
        OURS[config["_class_name"]][0].from_json(config)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (inputs(size=(6, 9)), "latents of 6x9 are not whole patches"),
        (inputs(size=(2, 66)), r"axes_lens = \(128, 32, 32\) are less than \(66, 1, 33\)"),
        (inputs(tokens=128), r"axes_lens = \(128, 32, 32\) are less than \(130, 3, 5\)"),
    ],
)
def test_z_image_refuses_inputs_without_positions(arrays, message):
    run, params = network(TINY["Z-Image"] | {"axes_lens": [128, 32, 32]})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, params, arrays)
