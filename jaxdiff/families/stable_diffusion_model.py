"""The networks of Stable Diffusion 1, 2 and XL as pure functions: the part that imports JAX."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.ip_adapter import IPAdapterFiles
from jaxdiff.checkpoint.original.ldm import names
from jaxdiff.checks import shown
from jaxdiff.errors import InputError
from jaxdiff.families.controlnets import refuse_misfit
from jaxdiff.families.model import (
    Control,
    Denoiser,
    ImageAdapter,
    Inpainting,
    Model,
    Params,
    Reference,
    Text,
)
from jaxdiff.families.networks import codec
from jaxdiff.images.clip_pixels import MEAN, STD
from jaxdiff.models import controlnet, controlnet_union, ip_adapter, unet
from jaxdiff.models.codecs import autoencoder_kl
from jaxdiff.models.layers import ImagePrompt
from jaxdiff.models.text import clip
from jaxdiff.weights.network import Network

# The aesthetic scores that XL's refiner is conditioned on (diffusers' defaults).
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
XL_LAYERS_SKIPPED = 1  # XL uses the penultimate hidden layer (arXiv:2307.01952, 2.1)
SHARDING = {"unet": unet.SHARDING, "vae": autoencoder_kl.SHARDING}
CONFIGS = {"unet": unet.UNetConfig, "vae": autoencoder_kl.AutoencoderKLConfig}
# The config keys that say how many modules a network has.
COUNTS = (
    *("block_out_channels", "layers_per_block", "transformer_layers_per_block"),
    "num_hidden_layers",
)


# The config keys in which a ControlNet must equal the U-Net, because it adds to its feature maps
# and is given what the U-Net is given. It may have fewer transformers.
SHARED_WITH_CONTROLNETS = (
    *("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("addition_embed_type", "projection_class_embeddings_input_dim"),
)


class Conditioning(NamedTuple):
    """The U-Net's inputs besides latents and timesteps; None for inputs that it does not take.

    Attributes:
      context: [batch, tokens, width], the encoded text.
      pooled: [batch, width], one vector for the whole text.
      time_ids: float32 [batch, 5 or 6], XL's size conditioning.
      image_prompts: those of IP-Adapters, for each attention to the text.
    """

    context: Array
    pooled: Array | None = None
    time_ids: Array | None = None
    image_prompts: Sequence[Sequence[ImagePrompt]] | None = None


def read_configs(parsed: Mapping[str, dict]) -> dict:
    """Converts each network's parsed config to its dataclass.

    Raises:
      InputError: if a value is not supported.
    """
    return {
        name: CONFIGS.get(name, clip.CLIPTextConfig).from_json(config)
        for name, config in parsed.items()
    }


def check_counts(configs: Mapping, weights: Mapping[str, Sized]) -> None:
    """Raises InputError if a config describes far more weights than its network has in the files.

    Building such a network might take for ever. A smaller difference is left to `refuse_misfits`,
    which names the weights.
    """
    for network, config in configs.items():
        held, described = len(weights[network]), config.to_json()
        if sum(1 for _ in islice(names(described), 2 * held + 1)) > 2 * held:
            said = (f"{key} = {shown(described[key])}" for key in COUNTS if key in described)
            raise InputError(
                f"{network}/config.json: {', '.join(said)} describe more than twice the {held} "
                "weights in the file; copy the checkpoint again"
            )


def build(configs: Mapping, index: Mapping, *, remat: bool = False) -> Model:
    """Builds the networks that the configs describe.

    Args:
      configs: the config dataclass of each network.
      index: the pipeline's `model_index.json`.
      remat: whether the U-Net recomputes activations for the gradient instead of storing them.

    Raises:
      InputError: if the networks do not fit together.
    """
    check_fit(configs, index)
    networks = {name: _network(name, config, remat) for name, config in configs.items()}
    encoders = tuple(name for name in configs if name not in CONFIGS)
    unet_config, vae = configs["unet"], configs["vae"]
    is_xl = "text_encoder_2" in encoders
    return Model(
        configs=configs,
        networks=networks,
        text_encoders=encoders,
        skippable={
            name: configs[name].num_hidden_layers - XL_LAYERS_SKIPPED * is_xl for name in encoders
        },
        encode_text=partial(
            encode_text,
            {name: networks[name] for name in encoders},
            layers_skipped=XL_LAYERS_SKIPPED * is_xl,
            pooled=is_xl,
        ),
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt")),
        sizes=partial(_sizes, _takes_score(index)) if _takes_sizes(unet_config) else None,
        condition=_condition,
        denoiser=Denoiser(
            component="unet",
            guidance_is_input=unet_config.time_cond_proj_dim is not None,
            sample_size=unet_config.sample_size,
            size_multiple=unet_config.factor,
            evaluate=partial(_evaluate, networks["unet"]),
            inpainting=_inpainting(unet_config, vae),
            reference=_reference(vae) if _edits(index) else None,
        ),
        codec=codec(networks["vae"], vae, vae.latent_channels),
    )


def _edits(index: Mapping) -> bool:
    return str(index.get("_class_name")).endswith("InstructPix2PixPipeline")


def _reference(vae) -> Reference:
    """Returns InstructPix2Pix's, whose image was not scaled in training."""
    return Reference(vae.latent_channels, lambda means: means)


def _inpainting(unet_config: unet.UNetConfig, vae) -> Inpainting | None:
    channels = vae.latent_channels + 1
    inpaints = unet_config.in_channels == vae.latent_channels + channels
    return Inpainting(channels, partial(_join, vae.factor)) if inpaints else None


def _join(factor: int, masks: Array, hidden: Array) -> Array:
    """Returns the mask, of the first pixel of each latent, and the masked image's latents."""
    return jnp.concatenate([masks[:, ::factor, ::factor, None], hidden], axis=-1)


def check_fit(configs: Mapping, index: Mapping) -> None:
    """Raises InputError unless the networks fit together."""
    encoders = [config for name, config in configs.items() if name not in CONFIGS]
    unet_config, vae = configs["unet"], configs["vae"]
    inpainting = _inpainting(unet_config, vae)
    more = inpainting.channels if inpainting else 0
    more = vae.latent_channels if _edits(index) else more
    needed = {
        "in_channels": vae.latent_channels + more,
        "out_channels": vae.latent_channels,
        "cross_attention_dim": sum(encoder.hidden_size for encoder in encoders),
    }
    if _takes_sizes(unet_config):
        count = 5 if _takes_score(index) else 6
        width = encoders[-1].projection_dim + count * unet_config.addition_time_embed_dim
        needed["projection_class_embeddings_input_dim"] = width
    check_widths(unet_config, vae, needed)


def check_widths(unet_config, vae, needed: Mapping[str, int]) -> None:
    """Raises InputError unless a U-Net and the autoencoder fit the other networks.

    Args:
      unet_config, vae: their configs.
      needed: what each of these keys of the U-Net's config must be.
    """
    for key, width in needed.items():
        if getattr(unet_config, key) != width:
            raise InputError(
                f"the U-Net's {key} = {getattr(unet_config, key)} does not fit the other networks, "
                f"which need {width}"
            )
    if vae.out_channels != 3:
        raise InputError(f"the autoencoder's out_channels = {vae.out_channels} must be 3 (RGB)")


def control(configs: Mapping, config: Mapping, *, remat: bool = False) -> Control:
    """Builds a ControlNet for the U-Net of these configs from its own parsed config.

    Raises:
      InputError: if a value of the config is not supported, or does not fit the U-Net.
    """
    is_union = config.get("_class_name") == controlnet_union.CLASS_NAME
    kind = controlnet_union.ControlNetUnionConfig if is_union else controlnet.ControlNetConfig
    read = kind.from_json(config)
    # A U-Net for inpainting has more channels.
    ours = {**vars(configs["unet"]), "in_channels": configs["vae"].latent_channels}
    refuse_misfit(ours, vars(read), SHARED_WITH_CONTROLNETS)
    if read.conditioning_channels != 3:
        raise InputError(
            f"the ControlNet's conditioning_channels = {read.conditioning_channels} must be 3 (RGB)"
        )
    factor = read.control_factor
    if factor != configs["vae"].factor:
        raise InputError(
            f"the ControlNet takes {factor} pixels per latent, the model {configs['vae'].factor}; "
            "use one that was trained for this model"
        )
    union = controlnet_union.ControlNetUnionModel
    model_class = union if is_union else controlnet.ControlNetModel
    network = Network(model_class, read, controlnet.SHARDING, {"remat": remat})
    return Control(
        network,
        partial(_steer, network),
        is_pooled=read.global_pool_conditions,
        is_union=is_union,
    )


def _steer(
    network: Network,
    params: Params,
    latents: Array,
    timesteps: Array,
    conditioning: Conditioning,
    images: Array,
    **union: Array,
) -> tuple[list[Array], Array]:
    """Evaluates a ControlNet; `union` is what only union nets take."""
    given = {"pooled": conditioning.pooled, "time_ids": conditioning.time_ids}
    module = network(params)
    return module(latents, timesteps, conditioning.context, images, **given, **union)


def image_adapter(configs: Mapping, files: IPAdapterFiles) -> ImageAdapter:
    """Builds an IP-Adapter for the U-Net of these configs.

    Raises:
      InputError: if its weights or its encoder's config are not supported, or do not fit the U-Net.
    """
    shapes = {key: tensor.shape for key, tensor in files.tensors.items()}
    read = ip_adapter.IPAdapterConfig.from_shapes(files.kind, shapes)
    ours, theirs = configs["unet"].cross_attention_widths, read.widths
    if ours != theirs:
        raise InputError(
            f"the IP-Adapter's {len(theirs)} attentions do not fit the {len(ours)} of this model; "
            "use one that was trained for it"
        )
    encoder_config = clip.CLIPImageEncoderConfig.from_json(files.encoder_config)
    layers = encoder_config.num_hidden_layers
    if layers > len(files.encoder_tensors):
        raise InputError(
            f"{files.encoder}/config.json: num_hidden_layers = {layers} describes more layers than "
            f"the {len(files.encoder_tensors)} weights in the file; copy the encoder again"
        )
    adapter = Network(ip_adapter.IPAdapterModel, read, ip_adapter.SHARDING)
    encoder = Network(clip.CLIPVisionModelWithProjection, encoder_config, clip.SHARDING)
    return ImageAdapter(
        adapter,
        encoder,
        encoder_config.image_size,
        partial(_encode_images, adapter, encoder, files.kind),
        partial(_encode_nothing, adapter, encoder, files.kind),
        lambda conditioning, prompts: conditioning._replace(
            image_prompts=ip_adapter.image_prompts(prompts)
        ),
    )


def _encode_images(
    adapter: Network,
    encoder: Network,
    kind: str,
    params: Params,
    encoder_params: Params,
    images: Array,
    dtype,
) -> list[tuple[Array, Array]]:
    pixels = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
    seen = ip_adapter.embedded(encoder(encoder_params), kind, pixels.astype(dtype))
    return adapter(params)(seen)


def _encode_nothing(
    adapter: Network,
    encoder: Network,
    kind: str,
    params: Params,
    encoder_params: Params,
    dtype,
) -> list[tuple[Array, Array]]:
    seen = ip_adapter.embedded_negative(encoder(encoder_params), kind, dtype)
    return adapter(params)(seen)


def for_inpainting(configs: Mapping) -> dict:
    """Returns the configs with a U-Net that also takes a mask and the masked image's latents."""
    channels = 2 * configs["vae"].latent_channels + 1
    return {**configs, "unet": replace(configs["unet"], in_channels=channels)}


def with_guidance_input(configs: Mapping, width: int) -> dict:
    """Returns the configs with a U-Net that embeds the guidance scale in `width` numbers."""
    return {**configs, "unet": replace(configs["unet"], time_cond_proj_dim=width)}


def encode_text(
    networks: Mapping[str, Network],
    params: Params,
    token_ids: dict[str, Array],
    clip_skip: int,
    *,
    layers_skipped: int = 0,
    pooled: bool = False,
) -> Text:
    """Encodes prompts with all text encoders; see `Model.encode_text`.

    Args:
      layers_skipped: how many of the last layers are always skipped, besides `clip_skip`.
      pooled: whether the denoiser takes a pooled vector, too. The hidden states of such models (XL,
        the latent upscaler) have no final norm.

    Returns:
      the context [batch, chunks * tokens, width], and the last encoder's pooled vector of the first
      chunk, [batch, width], or None.
    """
    contexts = []
    for name, network in networks.items():
        batch, chunks, tokens = token_ids[name].shape
        hidden, vector = network(params[name])(
            token_ids[name].reshape(batch * chunks, tokens),
            layers_skipped=clip_skip + layers_skipped,
            final_norm=not pooled,
        )
        contexts.append(hidden.reshape(batch, chunks * tokens, -1))
    vector = vector.reshape(batch, chunks, -1)[:, 0]
    return Text(jnp.concatenate(contexts, axis=-1), vector if pooled else None)


def module(component: str, config) -> type[nnx.Module]:
    """Returns the class of a component's network."""
    modules = {"unet": unet.UNet2DConditionModel, "vae": autoencoder_kl.AutoencoderKL}
    return modules.get(component) or clip.network(config)


def _network(component: str, config, remat: bool) -> Network:
    options = {"remat": remat} if component == "unet" else {}
    sharding = SHARDING.get(component, clip.SHARDING)
    return Network(module(component, config), config, sharding, options)


def _takes_sizes(config: unet.UNetConfig) -> bool:
    return config.addition_embed_type == "text_time"


def _takes_score(index: Mapping) -> bool:
    return bool(index.get("requires_aesthetics_score"))


def _sizes(takes_score: bool, height: int, width: int, negative: bool) -> tuple[float, ...]:
    """Returns the size conditioning of an uncropped image.

    See Podell et al., 2023, arXiv:2307.01952, 2.2.
    """
    size, corner = (height, width), (0, 0)
    if takes_score:
        return (*size, *corner, NEGATIVE_AESTHETIC_SCORE if negative else AESTHETIC_SCORE)
    return (*size, *corner, *size)


def _condition(text: Text, sizes: Array | None) -> Conditioning:
    return Conditioning(text.context, None if sizes is None else text.pooled, sizes)


def _evaluate(
    network: Network,
    params: Params,
    latents: Array,
    timesteps: Array,
    conditioning: Conditioning,
    guidance_scale: Array | None = None,
    kept: Array | None = None,
    *,
    residuals: tuple[list[Array], Array] | None = None,
) -> tuple[Array, Array]:
    return network(params).evaluate(
        latents,
        timesteps,
        deep=kept,
        **conditioning._asdict(),
        guidance_scale=guidance_scale,
        residuals=residuals,
    )
