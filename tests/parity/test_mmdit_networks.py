"""Stable Diffusion 3's and Qwen-Image's denoisers give the output of diffusers."""

import importlib

import numpy as np
import pytest
from flax import nnx

from jaxdiff.models import qwen_image, sd3
from jaxdiff.models.embeddings import constant_angles, rotary_angles
from jaxdiff.models.qwen_image import QwenImageConfig
from jaxdiff.models.sd3 import SD3Config, SD3Transformer2DModel

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import denoisers  # noqa: E402  (beside this file)
import networks  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_faster")

SD3, QWEN = "SD3Transformer2DModel", "QwenImageTransformer2DModel"

# The files as on the Hub.
SD3_MEDIUM = {
    "_class_name": SD3,
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "_diffusers_version": "0.31.0",
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    "_diffusers_version": "0.31.0.dev0",
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
QWEN_IMAGE = {
    "_class_name": QWEN,
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}

TINY_SD3 = {
    "_class_name": SD3,
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "in_channels": 8,
    "joint_attention_dim": 24,
    "num_attention_heads": 4,
    "num_layers": 3,
    "out_channels": 8,
    "patch_size": 2,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 24,
    "sample_size": 16,
}
TINY_SD35 = TINY_SD3 | {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}
TINY_QWEN = {
    "_class_name": QWEN,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "in_channels": 16,
    "joint_attention_dim": 24,
    "num_attention_heads": 2,
    "num_layers": 2,
    "out_channels": 4,
}
LENGTHS = (9, 4)  # of the texts in Qwen-Image's batch
TIMESTEPS = np.array([987.25, 31.5], np.float32)
SD3_INPUTS = {
    "latents": networks.drawn("latents", (2, 6, 10, 8)),
    "timesteps": TIMESTEPS,
    "context": networks.drawn("context", (2, 7, 24)),
    "pooled": networks.drawn("pooled", (2, 20)),
}
QWEN_INPUTS = {
    "latents": networks.drawn("latents", (2, 6, 10, 4)),  # sides of 3 and 5 patches: odd
    "timesteps": TIMESTEPS,
    "context": networks.drawn("context", (2, max(LENGTHS), 24)),
    "mask": np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None],
}
TINY = {"SD 3.5": (TINY_SD35, SD3_INPUTS), "Qwen": (TINY_QWEN, QWEN_INPUTS)}


@torch.no_grad()
def sd3_reference(config: dict, inputs: dict, **options) -> np.ndarray:
    latents, timesteps, context, pooled = map(torch.tensor, inputs.values())
    latents = latents.permute(0, 3, 1, 2)
    output = denoisers.reference(config)(latents, context, pooled, timesteps, **options).sample
    return output.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def qwen_reference(network, latents, timesteps, context, mask=None, reference=None) -> np.ndarray:
    """Packs latents with the pipeline's own functions, and divides the timesteps as it does."""
    batch, height, width, channels = latents.shape
    pipeline = diffusers.QwenImagePipeline
    images = [torch.tensor(each) for each in (latents, reference) if each is not None]
    images = [image.permute(0, 3, 1, 2) for image in images]
    tokens = [pipeline._pack_latents(each, batch, channels, height, width) for each in images]
    output = network(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=torch.tensor(context),
        encoder_hidden_states_mask=None if mask is None else torch.tensor(mask),
        timestep=torch.tensor(timesteps) / 1000,
        img_shapes=[[(1, height // 2, width // 2)] * len(images)] * batch,
    ).sample[:, : tokens[0].shape[1]]
    unpacked = pipeline._unpack_latents(output, 8 * height, 8 * width, 8)  # one frame
    return unpacked[:, :, 0].permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("extra", "skipped"),
    [
        ({}, ()),
        ({"qk_norm": "rms_norm"}, ()),
        ({"dual_attention_layers": [0, 1]}, ()),
        ({"dual_attention_layers": [0, 2], "qk_norm": "rms_norm"}, (1,)),
        ({"patch_size": 1, "in_channels": 9, "sample_size": 8}, (0, 2)),
    ],
    ids=["3", "3.5 large", "dual attention", "3.5 medium, one skipped", "patch 1, two skipped"],
)
def test_sd3(extra, skipped):
    config = TINY_SD3 | extra
    size = (2, 6, 10, config["in_channels"])
    inputs = SD3_INPUTS | {"latents": networks.drawn("latents", size)}
    ours = denoisers.compiled(config, skipped=skipped)(inputs)
    expected = sd3_reference(config, inputs, skip_layers=list(skipped))
    assert networks.difference(ours, expected) <= networks.BOUND


def test_qwen_image():
    """Two texts of different lengths, together with a mask and each alone without one."""
    run, network = denoisers.compiled(TINY_QWEN), denoisers.reference(TINY_QWEN)
    ours = run(QWEN_INPUTS)
    expected = qwen_reference(network, **QWEN_INPUTS)
    assert networks.difference(ours, expected) <= networks.BOUND
    for i, length in enumerate(LENGTHS):
        alone = {name: value[i : i + 1] for name, value in QWEN_INPUTS.items()}
        alone |= {"context": alone["context"][:, :length], "mask": alone["mask"][:, :length]}
        unmasked = {name: value for name, value in alone.items() if name != "mask"}
        expected = qwen_reference(network, **unmasked)
        assert networks.difference(run(alone), expected) <= networks.BOUND
        assert networks.difference(ours[i : i + 1], expected) <= networks.BOUND


def test_qwen_image_sees_an_image_to_edit():
    inputs = QWEN_INPUTS | {"reference": networks.drawn("reference", (2, 6, 10, 4))}
    run, network = denoisers.compiled(TINY_QWEN), denoisers.reference(TINY_QWEN)
    assert networks.difference(run(inputs), qwen_reference(network, **inputs)) <= networks.BOUND


@pytest.mark.parametrize("variant", TINY)
def test_an_image_does_not_depend_on_its_neighbours(variant):
    denoisers.check_that_neighbours_do_not_matter(*TINY[variant])


def test_padding_has_no_effect():
    padding = ~QWEN_INPUTS["mask"][..., None]
    other = QWEN_INPUTS | {"context": QWEN_INPUTS["context"] + 100 * padding.astype(np.float32)}
    run = denoisers.compiled(TINY_QWEN)
    np.testing.assert_array_equal(run(other), run(QWEN_INPUTS))


@pytest.mark.parametrize("variant", TINY)
def test_bfloat16(variant):
    denoisers.check_bfloat16(*TINY[variant])


@pytest.mark.parametrize("variant", TINY)
def test_recomputed_activations_give_the_same_gradients(variant):
    config, inputs = TINY[variant]
    config = config | {"num_layers": 2}
    gradients = denoisers.check_recomputed_gradients(config, inputs, blocks=2)
    assert np.any(gradients["proj_out"]["kernel"])
    if "pos_embed" in gradients:
        assert np.any(gradients["pos_embed"]["proj"]["kernel"])
        assert not np.any(gradients["pos_embed"]["pos_embed"])  # training leaves positions alone


@pytest.mark.parametrize("extra", [{}, {"sample_size": 9, "pos_embed_max_size": 11}])
def test_the_position_table_is_diffusers(extra):
    config = TINY_SD3 | {"num_layers": 1} | extra
    expected = getattr(diffusers, SD3).from_config(config).state_dict()[denoisers.POSITIONS].numpy()
    network = SD3Transformer2DModel(SD3Config.from_json(config), rngs=nnx.Rngs(0))
    table = network.pos_embed.pos_embed[...]
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(table, sd3.position_table(SD3Config.from_json(config)))


def test_the_angles_are_diffusers_at_full_size():
    """Qwen-Image's own frequencies at 1328x1328 pixels and 928x1664, the longest text."""
    widths = QWEN_IMAGE["axes_dims_rope"]
    module = importlib.import_module("diffusers.models.transformers.transformer_qwenimage")
    rope = module.QwenEmbedRope(10000, widths, scale_rope=True)
    for height, width in ((83, 83), (58, 104)):
        image, text = rope([(1, height, width)], max_txt_seq_len=1024)
        expected = torch.cat([text, image]).numpy()
        where = qwen_image.positions(1024, height, width)
        angles = rotary_angles(where, widths, qwen_image.THETA, dtype=np.float32)
        # PyTorch computes frequencies in float32; a last bit of theirs depends on the processor.
        most = 1e-6 + 2.0**-23 * np.abs(angles)
        for ours in (angles, constant_angles(angles)):
            assert (np.abs(np.cos(ours) - expected.real) <= most).all()
            assert (np.abs(np.sin(ours) - expected.imag) <= most).all()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SD3_MEDIUM, 683),
        (SD35_MEDIUM, 909),
        (SD35_LARGE, 1227),
        (QWEN_IMAGE, 1933),
    ],
    ids=["SD 3", "3.5 medium", "3.5 large", "Qwen-Image"],
)
def test_full_size(config, count):
    denoisers.check_full_size(config, count)


def test_newer_files_of_qwen_image_say_the_same():
    newer = {key: value for key, value in QWEN_IMAGE.items() if key != "pooled_projection_dim"}
    newer |= dict.fromkeys(("use_additional_t_cond", "use_layer3d_rope", "zero_cond_t"), False)
    assert QwenImageConfig.from_json(newer) == QwenImageConfig.from_json(QWEN_IMAGE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY_SD3 | {"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not supported"),
        (TINY_SD3 | {"caption_projection_dim": 64}, "caption_projection_dim = 64"),
        (TINY_SD3 | {"dual_attention_layers": ["0"]}, "dual_attention_layers = "),
        (TINY_SD3 | {"sample_size": 1}, "sample_size = 1 is less than patch_size"),
        (
            TINY_SD3
            | {"num_attention_heads": 1, "attention_head_dim": 6, "caption_projection_dim": 6},
            "6 is not a multiple of 4",
        ),
        (TINY_QWEN | {"zero_cond_t": True}, "zero_cond_t = True is not supported"),
        (TINY_QWEN | {"out_channels": 16}, "in_channels = 16 must be out_channels"),
        (TINY_QWEN | {"axes_dims_rope": [4, 5, 7]}, "must be 3 even numbers"),
    ],
)
def test_other_configs_are_refused(config, message):
    denoisers.check_refusal(config, message)


@pytest.mark.parametrize(
    ("variant", "size"), [("SD 3.5", (6, 50)), ("SD 3.5", (5, 8)), ("Qwen", (6, 7))]
)
def test_latents_that_do_not_fit_are_refused(variant, size):
    config, inputs = TINY[variant]
    latents = np.zeros((2, *size, inputs["latents"].shape[-1]), np.float32)
    with pytest.raises(ValueError, match=f"latents of {size[0]}x{size[1]}: each side must be a"):
        denoisers.compiled(config)(inputs | {"latents": latents})


def test_a_block_to_skip_has_to_exist():
    with pytest.raises(ValueError, match="there are only 3 blocks"):
        denoisers.compiled(TINY_SD3, skipped=(1, 3))(SD3_INPUTS)
