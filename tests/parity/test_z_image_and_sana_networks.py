"""With the same random weights, the denoisers of Z-Image and Sana give diffusers' output."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import denoisers  # noqa: E402  (beside this file)
import networks  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

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
LENGTHS = [5, 32, 40]  # of the texts, in tokens


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
    reference = denoisers.reference(config)
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
    ours, theirs = denoisers.compiled(TINY[family])(batch), expected(TINY[family], batch)
    for image, reference in zip(ours, theirs, strict=True):
        assert networks.difference(image, reference) <= networks.BOUND


@pytest.mark.parametrize("family", TINY)
def test_the_padding_of_a_text_does_not_change_its_image(family):
    run = denoisers.compiled(TINY[family])
    short, long = (np.asarray(run(inputs(tokens=tokens))) for tokens in (40, 128))
    assert networks.difference(long, short) <= 1e-5


@pytest.mark.parametrize("family", TINY)
def test_an_image_does_not_depend_on_its_neighbours(family):
    denoisers.check_that_neighbours_do_not_matter(TINY[family], inputs())


@pytest.mark.parametrize("family", TINY)
def test_bfloat16(family):
    denoisers.check_bfloat16(TINY[family], inputs())


@pytest.mark.parametrize(("family", "blocks"), [("Z-Image", 3), ("Sana", 1)])
def test_recomputed_activations_give_the_same_gradients(family, blocks):
    config = TINY[family] | {"n_layers" if family == "Z-Image" else "num_layers": 1}
    denoisers.check_recomputed_gradients(config, inputs(), blocks)


@pytest.mark.parametrize(
    ("config", "count"),
    [(Z_IMAGE, 521), (SANA, 396), (SANA_SMALL, 548)],
    ids=["Z-Image", "Sana 1.6B", "Sana 0.6B"],
)
def test_full_size(config, count):
    denoisers.check_full_size(config, count)


@pytest.mark.parametrize("family", TINY)
def test_diffusers_reads_the_config_that_we_write(family):
    network_class = getattr(diffusers, TINY[family]["_class_name"])
    written = denoisers.read(TINY[family]).to_json()
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
    denoisers.check_refusal(config, message)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (inputs(size=(6, 9)), "latents of 6x9 are not whole patches"),
        (inputs(size=(2, 66)), r"axes_lens = \(128, 32, 32\) are less than \(66, 1, 33\)"),
        (inputs(tokens=128), r"axes_lens = \(128, 32, 32\) are less than \(130, 3, 5\)"),
    ],
)
def test_z_image_refuses_inputs_without_positions(arrays, message):
    run = denoisers.compiled(TINY["Z-Image"] | {"axes_lens": [128, 32, 32]})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, arrays)
