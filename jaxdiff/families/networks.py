"""A checkpoint's networks as its configs ask for them: whether they fit each other and the files.

The configs say more than a Stable Diffusion network may be, so they are read strictly.
"""

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.errors import InputError
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.text import clip
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.weights.load import abstract_network, refuse_misfits

CONFIGS = {
    "text_encoder": clip.CLIPTextConfig,
    "text_encoder_2": clip.CLIPTextConfig,
    "unet": UNetConfig,
    "vae": AutoencoderKLConfig,
}


def read_configs(checkpoint: Checkpoint) -> dict:
    """Each network's config dataclass, by component.

    Raises:
      InputError: for what is not built, or if the networks do not fit each other.
    """
    configs = {}
    for network in checkpoint.networks:
        try:
            configs[network] = CONFIGS[network].from_json(checkpoint.config(network))
        except InputError as error:
            raise InputError(f"{checkpoint.path}: {error}") from error
    encoders = [configs[name] for name in checkpoint.text_encoders]
    unet, vae = configs["unet"], configs["vae"]
    needed = {
        "in_channels": vae.latent_channels,
        "out_channels": vae.latent_channels,
        "cross_attention_dim": sum(encoder.hidden_size for encoder in encoders),
    }
    if unet.addition_embed_type == "text_time":
        ids = 5 if checkpoint.index.get("requires_aesthetics_score") else 6
        width = encoders[-1].projection_dim + ids * unet.addition_time_embed_dim
        needed["projection_class_embeddings_input_dim"] = width
    for key, width in needed.items():
        if getattr(unet, key) != width:
            raise InputError(
                f"{checkpoint.path}: the U-Net's {key} = {getattr(unet, key)} does not fit the "
                f"networks beside it, which need {width}; copy the checkpoint again"
            )
    if vae.out_channels != 3:
        raise InputError(
            f"{checkpoint.path}: the autoencoder's out_channels = {vae.out_channels} are no RGB"
        )
    return configs


def check_networks(checkpoint: Checkpoint) -> None:
    """Raises InputError unless every network can be built, and the files hold just its weights."""
    for network, config in read_configs(checkpoint).items():
        if network == "unet":
            model_class = UNet2DConditionModel
        elif network == "vae":
            model_class = AutoencoderKL
        else:
            model_class = clip.network(config)
        _, shapes = abstract_network(model_class, config)
        refuse_misfits(shapes, checkpoint.weights(network))
