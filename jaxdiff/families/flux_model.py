"""The networks of FLUX.1 as pure functions: the part that imports JAX."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.families.controlnets import refuse_misfit
from jaxdiff.families.model import Control, Inpainting, Model, Params, Reference, Text
from jaxdiff.families.networks import (
    AUTOENCODER_KL,
    CLIP_TEXT,
    T5,
    Architecture,
    Networks,
    fit,
    model,
)
from jaxdiff.models import flux, flux_controlnet
from jaxdiff.weights.network import Network

CONTROLNET = Architecture(
    flux_controlnet.FluxControlNetConfig,
    lambda config: flux_controlnet.FluxControlNetModel,
    flux_controlnet.SHARDING,
)


def _assemble(
    configs: Mapping,
    networks: Mapping[str, Network],
    *,
    patch: int,
    sample_size: int,
    inpaints: bool,
    edits: bool,
    sees_control: bool,
) -> Model:
    transformer, vae = configs["transformer"], configs["vae"]
    clip, t5 = configs["text_encoder"], configs["text_encoder_2"]
    channels = patch**2 * vae.latent_channels
    inpainting = Inpainting(
        vae.latent_channels + vae.factor**2, partial(_join, vae.factor), encodes_image=True
    )
    more = patch**2 * inpainting.channels if inpaints else channels * sees_control
    fit(
        [
            ("in_channels", transformer.in_channels, channels + more),
            ("out_channels", transformer.out_channels or transformer.in_channels, channels),
            ("pooled_projection_dim", transformer.pooled_projection_dim, clip.hidden_size),
            ("joint_attention_dim", transformer.joint_attention_dim, t5.d_model),
        ]
    )
    return model(
        configs,
        networks,
        _encode_text,
        text_encoders=("text_encoder", "text_encoder_2"),
        channels=vae.latent_channels,
        guidance_is_input=transformer.guidance_embeds,
        sample_size=sample_size,
        size_multiple=patch,
        inpainting=inpainting if inpaints else None,
        reference=Reference(vae.latent_channels, vae.scale) if edits else None,
        sees_control=sees_control,
    )


def _join(factor: int, masks: Array, hidden: Array) -> Array:
    """Returns the masked image's latents, and as channels the mask's pixels of each latent."""
    batch, height, width = masks.shape
    rows, columns = height // factor, width // factor
    pixels = masks.reshape(batch, rows, factor, columns, factor).transpose(0, 1, 3, 2, 4)
    return jnp.concatenate([hidden, pixels.reshape(batch, rows, columns, factor**2)], axis=-1)


def _control(
    shared: Sequence[str], configs: Mapping, config: Mapping, *, remat: bool = False
) -> Control:
    """Builds a ControlNet for the transformer of these configs; see `family.Networks.control`."""
    read, transformer = CONTROLNET.config.from_json(config), configs["transformer"]
    refuse_misfit(vars(transformer), vars(read), shared)
    network = Network(
        flux_controlnet.FluxControlNetModel, read, CONTROLNET.sharding, {"remat": remat}
    )
    blocks = transformer.num_layers, transformer.num_single_layers
    return Control(
        network,
        partial(_steer, network, blocks),
        is_pooled=False,
        sees_latents=True,
        guidance_is_input=read.guidance_embeds,
        is_union=read.num_mode is not None,
    )


def _steer(
    network: Network,
    blocks: tuple[int, int],
    params: Params,
    latents: Array,
    timesteps: Array,
    conditioning: Mapping[str, Array],
    control: Array,
    guidance_scale: Array | None = None,
    modes: Array | None = None,
    weights: Array | None = None,
) -> tuple[list[Array], list[Array]]:
    """Evaluates a ControlNet for a transformer with so many double and single blocks.

    A union net is evaluated for each image alone, and the weighted residuals are added up.
    """
    module = network(params)
    given = {**conditioning, "guidance_scale": guidance_scale}

    def residuals(control: Array, modes: Array | None = None) -> tuple[list[Array], list[Array]]:
        seen = control.astype(latents.dtype)
        double, single = module(latents, timesteps, seen, **given, modes=modes)
        return flux_controlnet.spread(double, single, blocks)

    if modes is None:
        return residuals(control)
    each = [residuals(control[:, image], modes[:, image]) for image in range(modes.shape[1])]

    def added(*leaves: Array) -> Array:
        factors = weights.astype(leaves[0].dtype)[..., None, None]  # [batch, images, 1, 1]
        return sum(leaf * factors[:, image] for image, leaf in enumerate(leaves))

    return jax.tree.map(added, *each)


def _encode_text(encoders: Mapping[str, nnx.Module], tokens: Mapping, clip_skip: int) -> Text:
    """Encodes prompts; T5's padding is seen like all other tokens, as in training."""
    ids = tokens["text_encoder"][:, 0]  # the only chunk
    _, pooled = encoders["text_encoder"](ids)
    return Text(encoders["text_encoder_2"](tokens["text_encoder_2"].ids), pooled)


def networks(
    *,
    patch: int,
    sample_size: int,
    inpaints: bool = False,
    edits: bool = False,
    sees_control: bool = False,
    shared_with_controlnets: Sequence[str] = (),
) -> Networks:
    """Returns the networks; the arguments are constants of the family's page.

    Only a model that shares config keys with ControlNets takes any.
    """
    return Networks(
        architectures={
            "text_encoder": CLIP_TEXT,
            "text_encoder_2": T5,
            "transformer": Architecture(
                flux.FluxConfig, lambda config: flux.FluxTransformer2DModel, flux.SHARDING
            ),
            "vae": AUTOENCODER_KL,
        },
        assemble=partial(
            _assemble,
            patch=patch,
            sample_size=sample_size,
            inpaints=inpaints,
            edits=edits,
            sees_control=sees_control,
        ),
        steer=partial(_control, shared_with_controlnets) if shared_with_controlnets else None,
    )
