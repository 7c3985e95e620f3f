"""Each network, with random weights that diffusers or transformers wrote, gives their output."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.models.clip import CLIPTextConfig, CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def randomised(network):
    """Moves every weight, so that no norm is left at one and no bias at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return network.eval()


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


CLIP = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    max_position_embeddings=12,
    bos_token_id=98,
    eos_token_id=99,
    pad_token_id=99,
)
CLIP_VARIANTS = {
    "CLIP-L": dict(num_hidden_layers=3, hidden_act="quick_gelu"),
    "OpenCLIP-H": dict(num_hidden_layers=4, hidden_act="gelu", pad_token_id=0),
    "old eos": dict(num_hidden_layers=2, eos_token_id=2, layer_norm_eps=1e-3),
}


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("variant", CLIP_VARIANTS)
def test_clip(tmp_path, load, assert_close, variant, prefix):
    config = transformers.CLIPTextConfig(**CLIP | CLIP_VARIANTS[variant])
    reference = randomised(transformers.CLIPTextModel(config))
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
    save_file({prefix + key: value for key, value in weights.items()}, file)

    tokens = np.random.default_rng(0).integers(0, 98, (3, 12))
    tokens[:, 0], tokens[:, 7:] = 98, 99
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).last_hidden_state
    assert_close(load(CLIPTextModel, CLIPTextConfig, tmp_path)(tokens), expected)


UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=8,
)
UNET_VARIANTS = {
    "SD 1": {},
    "SD 2": dict(
        use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True, norm_eps=1e-3
    ),
    "bundled": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "three blocks of two layers": dict(
        block_out_channels=(16, 24, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        attention_head_dim=(2, 3, 4),
    ),
    "other sinusoids": dict(flip_sin_to_cos=False, freq_shift=1),
    "nine channels, deeper transformers": dict(in_channels=9, transformer_layers_per_block=2),
}


# An odd number of latents is cropped on the way up.
@pytest.mark.parametrize(
    ("variant", "height", "width"),
    [*((variant, 8, 8) for variant in UNET_VARIANTS), ("three blocks of two layers", 5, 11)],
)
def test_unet(tmp_path, load, assert_close, variant, height, width):
    reference = randomised(diffusers.UNet2DConditionModel(**UNET | UNET_VARIANTS[variant]))
    reference.save_pretrained(tmp_path)
    unet = load(UNet2DConditionModel, UNetConfig, tmp_path)
    random = np.random.default_rng(0)
    channels = reference.config.in_channels
    latents = random.standard_normal((2, channels, height, width), np.float32)
    timesteps = np.array([999, 17])
    context = random.standard_normal((2, 12, 24), np.float32)
    with torch.no_grad():
        expected = reference(
            torch.tensor(latents), torch.tensor(timesteps), torch.tensor(context)
        ).sample
    assert_close(unet(nhwc(latents), timesteps, context), nhwc(expected))


VAE = dict(
    block_out_channels=(8, 16, 16, 32),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=64,
)
VAE_VARIANTS = {
    "SD": {},
    "one layer a block, three blocks": dict(
        layers_per_block=1,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ),
    "SD 3": dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "no attention": dict(mid_block_add_attention=False),
}


@pytest.mark.parametrize("variant", VAE_VARIANTS)
def test_vae(tmp_path, load, assert_close, variant):
    reference = randomised(diffusers.AutoencoderKL(**VAE | VAE_VARIANTS[variant]))
    reference.save_pretrained(tmp_path)
    vae = load(AutoencoderKL, AutoencoderKLConfig, tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 48, 32)).astype(np.float32)
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(images)).latent_dist
        decoded = reference.decode(posterior.mean).sample
    mean, log_variance = vae(nhwc(images), method="encode")
    assert_close(mean, nhwc(posterior.mean))
    assert_close(log_variance, nhwc(posterior.logvar))
    assert_close(vae(nhwc(posterior.mean), method="decode"), nhwc(decoded))
