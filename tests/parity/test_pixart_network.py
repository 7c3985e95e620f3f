"""With the same random weights, PixArt's denoiser gives diffusers' output."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import denoisers  # noqa: E402  (beside this file)
import networks  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

# As diffusers writes the published files today.
ALPHA = {  # 1024x1024
    "_class_name": "PixArtTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "dropout": 0.0,
    "in_channels": 4,
    "interpolation_scale": None,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 128,
    "upcast_attention": False,
    "use_additional_conditions": None,
}
SIGMA = ALPHA | {"interpolation_scale": 2, "use_additional_conditions": False}
SMALL = {
    "attention_head_dim": 12,
    "caption_channels": 24,
    "cross_attention_dim": 24,
    "num_attention_heads": 2,
    "num_layers": 2,
}
VARIANTS = {
    "Alpha": ALPHA | SMALL,
    "Sigma": SIGMA | SMALL,
    "no variance, other scale": SIGMA | SMALL | {"out_channels": 4, "sample_size": 24},
}


def inputs(config: dict) -> dict[str, np.ndarray]:
    """Two images that are not square, with texts of different lengths."""
    found = {
        "latents": networks.drawn("latents", (2, 6, 10, config["in_channels"])),
        "timesteps": np.array([999, 17]),
        "context": networks.drawn("context", (2, 9, config["caption_channels"])),
        "mask": np.arange(9) < np.array([9, 4])[:, None],
    }
    if networks.read(config).takes_sizes:
        found["sizes"] = np.array([[768, 1280, 0.6], [1024, 512, 2]], np.float32)
    return found


def reference(config: dict, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What diffusers makes of the same weights and inputs, without the variance."""
    given = {name: torch.tensor(array) for name, array in arrays.items()}
    sizes = given.get("sizes")
    with torch.no_grad():
        output = denoisers.reference(config)(
            given["latents"].permute(0, 3, 1, 2),
            encoder_hidden_states=given["context"],
            timestep=given["timesteps"],
            added_cond_kwargs={
                "resolution": None if sizes is None else sizes[:, :2],
                "aspect_ratio": None if sizes is None else sizes[:, 2:],
            },
            encoder_attention_mask=given["mask"].float(),
        ).sample
    return output[:, : config["in_channels"]].permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_match_diffusers(variant):
    config = VARIANTS[variant]
    arrays = inputs(config)
    ours = denoisers.compiled(config)(arrays)
    assert networks.difference(ours, reference(config, arrays)) <= networks.BOUND


def test_an_image_does_not_depend_on_its_neighbours():
    denoisers.check_that_neighbours_do_not_matter(VARIANTS["Alpha"], inputs(VARIANTS["Alpha"]))


def test_bfloat16():
    denoisers.check_bfloat16(VARIANTS["Alpha"], inputs(VARIANTS["Alpha"]))


def test_recomputed_activations_give_the_same_gradients():
    config = VARIANTS["Alpha"] | {"num_layers": 1}
    denoisers.check_recomputed_gradients(config, inputs(config), blocks=1)


def test_padding_has_no_effect():
    config = VARIANTS["Sigma"]
    arrays, run = inputs(config), denoisers.compiled(config)
    padding = ~arrays["mask"][..., None]
    other = arrays | {"context": arrays["context"] + 100 * padding.astype(np.float32)}
    np.testing.assert_array_equal(run(other), run(arrays))


@pytest.mark.parametrize(
    ("config", "count", "millions"),
    [(ALPHA, 611, 611.35), (SIGMA, 603, 610.86)],
    ids=["Alpha", "Sigma"],
)
def test_full_size(config, count, millions):
    shapes = denoisers.check_full_size(config, count)
    assert round(sum(map(np.prod, shapes.values())) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ALPHA | {"norm_type": "ada_norm_zero"}, "norm_type = 'ada_norm_zero' is not supported"),
        (ALPHA | {"cross_attention_dim": 768}, "cross_attention_dim must be 1152"),
        (ALPHA | {"out_channels": 6}, "out_channels must be once or twice in_channels"),
        (
            ALPHA | {"attention_head_dim": 4, "cross_attention_dim": 64},
            "use_additional_conditions needs a width that 3 divides",
        ),
        (ALPHA | {"qk_norm": "rms_norm"}, "the key qk_norm = 'rms_norm' is not supported"),
    ],
)
def test_other_configs_are_refused(config, message):
    denoisers.check_refusal(config, message)
