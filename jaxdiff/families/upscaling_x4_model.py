"""The networks of Stable Diffusion's x4 upscaler as pure functions: the part that imports JAX."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxdiff.errors import InputError
from jaxdiff.families.model import Denoiser, Enlarging, Model, Params
from jaxdiff.families.networks import AUTOENCODER_KL, CLIP_TEXT, Architecture, Networks, codec
from jaxdiff.families.stable_diffusion_model import check_widths, encode_text
from jaxdiff.families.upscaling_values import NOISE_LEVEL
from jaxdiff.models import unet_upscaler
from jaxdiff.weights.network import Network

IMAGE_CHANNELS = 3
SCALING_FACTOR = 0.08333  # of the latents, whatever the file says, as in diffusers' pipeline


def _assemble(configs: Mapping, networks: Mapping[str, Network]) -> Model:
    """Returns the model; raises InputError if the networks do not fit together."""
    text, unet, vae = (configs[name] for name in ("text_encoder", "unet", "vae"))
    needed = {
        "in_channels": vae.latent_channels + IMAGE_CHANNELS,
        "out_channels": vae.latent_channels,
        "cross_attention_dim": text.hidden_size,
    }
    check_widths(unet, vae, needed)
    if unet.num_class_embeds <= NOISE_LEVEL:
        raise InputError(
            f"the U-Net's num_class_embeds = {unet.num_class_embeds} must be above {NOISE_LEVEL}, "
            "the level of the noise in the image"
        )
    return Model(
        configs=configs,
        networks=networks,
        text_encoders=("text_encoder",),
        skippable={"text_encoder": text.num_hidden_layers},
        encode_text=partial(encode_text, {"text_encoder": networks["text_encoder"]}),
        condition=lambda text, sizes: text.context,
        denoiser=Denoiser(
            component="unet",
            sample_size=unet.sample_size,
            size_multiple=unet.factor,
            evaluate=partial(_evaluate, networks["unet"]),
            enlarging=Enlarging(vae.factor, IMAGE_CHANNELS, sees_latents=False),
        ),
        codec=codec(networks["vae"], vae, vae.latent_channels),
    )


def _evaluate(
    network: Network,
    params: Params,
    latents: Array,
    timesteps: Array,
    context: Array,
    guidance_scale: None = None,
    kept: Array | None = None,
) -> tuple[Array, Array]:
    """Evaluates the U-Net; see `Denoiser.evaluate`."""
    labels = jnp.full(len(latents), NOISE_LEVEL)
    return network(params).evaluate(latents, timesteps, context, kept, class_labels=labels)


_NETWORKS = Networks(
    {
        "text_encoder": CLIP_TEXT,
        "unet": Architecture(
            unet_upscaler.UNetUpscalerConfig,
            lambda config: unet_upscaler.UNetUpscaler,
            unet_upscaler.SHARDING,
        ),
        "vae": AUTOENCODER_KL,
    },
    _assemble,
)


def read_configs(parsed: Mapping[str, dict]) -> dict:
    """Reads each network's parsed config strictly into its dataclass."""
    configs = _NETWORKS.read_configs(parsed)
    return configs | {"vae": replace(configs["vae"], scaling_factor=SCALING_FACTOR)}


check_counts, module, build = _NETWORKS.check_counts, _NETWORKS.module, _NETWORKS.build
control, image_adapter = _NETWORKS.control, _NETWORKS.image_adapter
for_inpainting, with_guidance_input = _NETWORKS.for_inpainting, _NETWORKS.with_guidance_input
