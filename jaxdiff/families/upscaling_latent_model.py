"""The networks of the latent x2 upscaler as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxdiff.families.model import Denoiser, Enlarging, Model, Params, Text
from jaxdiff.families.networks import AUTOENCODER_KL, CLIP_TEXT, Architecture, Networks, codec
from jaxdiff.families.stable_diffusion_model import check_widths, encode_text
from jaxdiff.families.upscaling_values import LATENT_FACTOR
from jaxdiff.models import k_unet
from jaxdiff.weights.network import Network

LEVEL_WIDTH = 64  # of the cosines, and of the sines, of the noise in the image that is enlarged


def _assemble(configs: Mapping, networks: Mapping[str, Network]) -> Model:
    """Returns the model; raises InputError if the networks do not fit together."""
    text, unet, vae = (configs[name] for name in ("text_encoder", "unet", "vae"))
    needed = {
        "in_channels": 2 * vae.latent_channels,
        "out_channels": vae.latent_channels + 1,
        "cross_attention_dim": text.hidden_size,
        "time_cond_proj_dim": 2 * LEVEL_WIDTH + text.hidden_size,
    }
    check_widths(unet, vae, needed)
    encoder = {"text_encoder": networks["text_encoder"]}
    return Model(
        configs=configs,
        networks=networks,
        text_encoders=tuple(encoder),
        skippable={"text_encoder": text.num_hidden_layers},
        encode_text=partial(encode_text, encoder, pooled=True),
        empty_at_zero=True,
        condition=lambda text, sizes: text,
        denoiser=Denoiser(
            component="unet",
            sample_size=unet.sample_size,
            size_multiple=unet.factor,
            evaluate=partial(_evaluate, networks["unet"]),
            enlarging=Enlarging(LATENT_FACTOR, vae.latent_channels, sees_latents=True),
            sees_noise_level=True,
        ),
        codec=codec(networks["vae"], vae, vae.latent_channels),
    )


def _evaluate(
    network: Network,
    params: Params,
    latents: Array,
    timesteps: Array,
    text: Text,
    guidance_scale: None = None,
    kept: None = None,
) -> tuple[Array, None]:
    """Evaluates the U-Net and returns v; see `Denoiser.evaluate`.

    The last channel of its output is a variance, which no sampler uses. The image that it enlarges
    has no noise, of which the cosines are 1 and the sines 0.
    """
    shape = len(latents), LEVEL_WIDTH
    level = [jnp.ones(shape, latents.dtype), jnp.zeros(shape, latents.dtype)]
    condition = jnp.concatenate([*level, text.pooled], axis=-1)
    output = network(params)(latents, timesteps, text.context, condition)
    return -output[..., :-1], None


_NETWORKS = Networks(
    {
        "text_encoder": CLIP_TEXT,
        "unet": Architecture(k_unet.KUNetConfig, lambda config: k_unet.KUNet, k_unet.SHARDING),
        "vae": AUTOENCODER_KL,
    },
    _assemble,
)
read_configs, check_counts = _NETWORKS.read_configs, _NETWORKS.check_counts
module, build = _NETWORKS.module, _NETWORKS.build
control, image_adapter = _NETWORKS.control, _NETWORKS.image_adapter
for_inpainting, with_guidance_input = _NETWORKS.for_inpainting, _NETWORKS.with_guidance_input
