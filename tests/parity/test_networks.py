"""Each network, with random weights that diffusers or transformers wrote, gives their output."""

import numpy as np
import pytest

from jaxdiff.models.vae import AutoencoderKLConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import families  # noqa: E402  (beside this file)


def randomised(network):
    """Moves every weight, so that no norm is left at one and no bias at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return network.eval()


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


# The former is saved without a prefix before its keys, the latter with one.
PLAIN, PROJECTED = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
TEXT_ENCODERS = {
    "SD 1 and XL's first": (PLAIN, families.CLIP_L),
    "SD 2": (PLAIN, families.OPEN_CLIP_H),
    "XL's second": (PROJECTED, families.OPEN_CLIP_G),
    "first end token": (PLAIN, families.CLIP_L | {"eos_token_id": 99}),
    "first end token, projected": (PROJECTED, families.OPEN_CLIP_G | {"eos_token_id": 99}),
    "another epsilon": (PLAIN, families.CLIP_L | {"layer_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("variant", TEXT_ENCODERS)
def test_text_encoders(tmp_path, load, assert_close, variant):
    network, config = TEXT_ENCODERS[variant]
    reference = randomised(network(transformers.CLIPTextConfig(**config)))
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 640, (3, 12))
    tokens[:, 0], tokens[:, 5:7], tokens[:, 8:10] = 639, 99, 640  # 99, or the largest: 640
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), output_hidden_states=True)
        final_norm = getattr(reference, "text_model", reference).final_layer_norm
        states = expected.hidden_states
        normed = [final_norm(state) for state in states]  # what clip_skip makes of an earlier one
    encode = load("text_encoder", tmp_path)

    for skipped in range(3):
        hidden, pooled = encode(tokens, options={"layers_skipped": skipped})
        assert_close(hidden, normed[-1 - skipped])
        assert_close(pooled, expected.pooler_output if network is PLAIN else expected.text_embeds)
    hidden, _ = encode(tokens, options={"layers_skipped": 1, "final_norm": False})
    assert_close(hidden, states[-2])


UNETS = {
    "SD 1": families.UNET,
    "SD 2": families.UNET_2 | {"upcast_attention": True},
    "XL": families.UNET_XL,
    "XL refiner": families.UNET_REFINER | {"transformer_layers_per_block": 4},
    "LCM": families.UNET | {"time_cond_proj_dim": 256},
    "bundled": families.UNET
    | {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
UNETS["two layers a block"] = UNETS["bundled"] | {"layers_per_block": 2, "norm_eps": 1e-3}
UNETS["nine channels, other sinusoids"] = UNETS["bundled"] | {
    "in_channels": 9,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


def conditions(config, random):
    """What is beside the latents, the timesteps and the text: for us, and for diffusers."""
    ours, theirs = {}, {}
    if config.addition_embed_type:
        count = (config.projection_class_embeddings_input_dim - 40) // 8
        ours["pooled"] = random.standard_normal((2, 40), np.float32)
        ours["time_ids"] = np.array([[1024, 768, 0, 64, 512, 1023], [8, 2048, 3, 0, 6, 2.5]])
        ours["time_ids"] = ours["time_ids"][:, :count].astype(np.float32)
        theirs["added_cond_kwargs"] = {
            "text_embeds": torch.tensor(ours["pooled"]),
            "time_ids": torch.tensor(ours["time_ids"]),
        }
    if config.time_cond_proj_dim:
        ours["guidance_scale"] = np.array([8.5, 1.0], np.float32)
        theirs["timestep_cond"] = (
            diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
                None, torch.tensor(ours["guidance_scale"]) - 1, config.time_cond_proj_dim
            )
        )
    return ours, theirs


# An odd number of latents is cropped on the way up.
@pytest.mark.parametrize(
    ("variant", "height", "width"),
    [(name, 5, 11) if name in ("XL refiner", "bundled") else (name, 8, 8) for name in UNETS],
)
def test_unets(tmp_path, load, assert_close, variant, height, width):
    reference = randomised(diffusers.UNet2DConditionModel(**UNETS[variant]))
    reference.save_pretrained(tmp_path)
    unet = load("unet", tmp_path)
    random = np.random.default_rng(0)
    config = reference.config
    latents = random.standard_normal((2, config.in_channels, height, width), np.float32)
    timesteps = np.array([999, 17])
    context = random.standard_normal((2, 12, config.cross_attention_dim), np.float32)
    ours, theirs = conditions(config, random)
    with torch.no_grad():
        expected = reference(
            torch.tensor(latents), torch.tensor(timesteps), torch.tensor(context), **theirs
        ).sample
    assert_close(unet(nhwc(latents), timesteps, context, **ours), nhwc(expected))


AUTOENCODERS = {
    "SD": {},
    "two layers a block": dict(layers_per_block=2),
    "three blocks": dict(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ),
    "SD 3": dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "no attention": dict(mid_block_add_attention=False),
}


@pytest.mark.parametrize("variant", AUTOENCODERS)
def test_autoencoders(tmp_path, load, assert_close, variant):
    reference = randomised(diffusers.AutoencoderKL(**families.VAE | AUTOENCODERS[variant]))
    reference.save_pretrained(tmp_path)
    vae = load("vae", tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 48, 32)).astype(np.float32)
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(images)).latent_dist
        decoded = reference.decode(posterior.mean).sample
    mean, log_variance = vae(nhwc(images), method="encode")
    assert_close(mean, nhwc(posterior.mean))
    assert_close(log_variance, nhwc(posterior.logvar))
    assert_close(vae(nhwc(posterior.mean), method="decode"), nhwc(decoded))


def test_latents_are_scaled_for_each_channel_as_the_xl_pipeline_does():
    mean, std = [0.5, -1.0, 2.0, 0.25], [1.5, 2.0, 0.5, 8.0]
    config = AutoencoderKLConfig(latents_mean=tuple(mean), latents_std=tuple(std))
    latents = np.random.default_rng(0).standard_normal((2, 3, 5, 4), np.float32)
    expected = latents * std / config.scaling_factor + mean
    np.testing.assert_allclose(config.unscale(latents), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(config.scale(config.unscale(latents)), latents, atol=1e-5)
