"""What the JAX halves of the transformer families share."""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.ip_adapter import IPAdapterFiles
from jaxdiff.checks import shown
from jaxdiff.errors import InputError
from jaxdiff.families.model import (
    Codec,
    Control,
    Denoiser,
    ImageAdapter,
    Model,
    Params,
    Reference,
    Text,
)
from jaxdiff.models.codecs import autoencoder_kl
from jaxdiff.models.sharding import Rules
from jaxdiff.models.text import clip, qwen, t5
from jaxdiff.weights.network import Network

# The config keys that say how many modules a network has: as a number, or a number for each block,
COUNTS = (
    *("decoder_layers_per_block", "depth", "encoder_layers_per_block", "layers_per_block"),
    *(
        "n_layers",
        "n_refiner_layers",
        "num_hidden_layers",
        "num_layers",
        "num_res_blocks",
        "num_single_layers",
    ),
)
# and by the length of a list.
LISTS = (
    *("block_out_channels", "decoder_block_out_channels", "decoder_qkv_multiscales", "dim_mult"),
    *("encoder_block_out_channels", "encoder_qkv_multiscales"),
)


@dataclass(frozen=True)
class Architecture:
    """A network's classes.

    Attributes:
      config: its config dataclass, with `from_json` and `to_json`.
      module: maps a config to the Flax module's class.
      sharding: the rules that split its parameters over a mesh.
      model_types: those that its config may have, if it is not one that the config's class fixes.
    """

    config: type
    module: Callable[[Any], type[nnx.Module]]
    sharding: Rules
    model_types: tuple[str, ...] = ()

    def read(self, folder: str, parsed: dict) -> Any:
        """Reads a parsed config strictly into its dataclass; raises InputError, naming the folder.

        A wrong `model_type` comes first: it says more than the keys that only other networks have.
        """
        fixed = self.config.fixed.get("model_type")
        known = self.model_types or ((fixed,) if fixed else ())
        found = parsed.get("model_type")
        if known and found is not None and found not in known:
            raise InputError(
                f"{folder}/config.json: model_type = {shown(found)} is not supported (only "
                f"{' or '.join(map(repr, known))} is); copy the checkpoint again"
            )
        try:
            return self.config.from_json(parsed)
        except InputError as problem:  # which names the folder that such networks mostly have
            said = str(problem).removeprefix(f"{self.config.component}/")
            raise InputError(f"{folder}/{said}") from problem


@dataclass(frozen=True)
class Networks:
    """The networks of a transformer family; see `family.Networks`.

    Attributes:
      architectures: by component.
      assemble: maps (configs, networks) to the `Model`; raises InputError if the networks do not
        fit together.
      steer: `control`; None if there are no ControlNets for its models.
    """

    architectures: Mapping[str, Architecture]
    assemble: Callable[[Mapping, Mapping[str, Network]], Model]
    steer: Callable[..., Control] | None = None

    def read_configs(self, parsed: Mapping[str, dict]) -> dict:
        """Reads each network's parsed config strictly into its dataclass."""
        return {
            name: self.architectures[name].read(name, config) for name, config in parsed.items()
        }

    def check_counts(self, configs: Mapping, weights: Mapping[str, Sized]) -> None:
        """Raises InputError if a config describes more modules than its network has weights."""
        for network, config in configs.items():
            held, described = len(weights[network]), config.to_json()
            described = {**described.get("vision_config", {}), **described}
            counts = {key: np.sum(described.get(key) or 0) for key in COUNTS}
            counts |= {key: len(jax.tree.leaves(described.get(key))) for key in LISTS}
            for key, count in counts.items():
                if count > held:
                    raise InputError(
                        f"{network}/config.json: {key} = {shown(described[key])} describes more "
                        f"modules than the {held} weights in the file; copy the checkpoint again"
                    )

    def module(self, component: str, config: Any) -> Callable:
        """Returns the Flax module's class for a component."""
        return self.architectures[component].module(config)

    def build(self, configs: Mapping, index: Mapping, *, remat: bool = False) -> Model:
        """Builds the networks; `remat` is an option of the denoiser, "transformer"."""
        networks = {}
        for name, config in configs.items():
            options = {"remat": remat} if name == "transformer" else {}
            sharding = self.architectures[name].sharding
            networks[name] = Network(self.module(name, config), config, sharding, options)
        return self.assemble(configs, networks)

    def control(self, configs: Mapping, config: Mapping, *, remat: bool = False) -> Control:
        """Builds a ControlNet for a model with these configs; see `family.Networks`."""
        if self.steer is None:
            raise InputError(
                "models of this family take no ControlNets; use Stable Diffusion or FLUX.1"
            )
        return self.steer(configs, config, remat=remat)

    def image_adapter(self, configs: Mapping, files: IPAdapterFiles) -> ImageAdapter:
        """Raises InputError: there are no IP-Adapters for these models yet."""
        raise InputError("models of this family take no IP-Adapters; use Stable Diffusion")

    def for_inpainting(self, configs: Mapping) -> dict:
        """Raises InputError: only U-Nets can be widened."""
        raise InputError("models of this family cannot be widened for it; use Stable Diffusion")

    def with_guidance_input(self, configs: Mapping, width: int) -> dict:
        """Raises InputError: only U-Nets can be distilled."""
        raise InputError("models of this family cannot be distilled; use Stable Diffusion")


def fit(requirements: Sequence[tuple[str, int, int]]) -> None:
    """Raises InputError unless the networks fit together.

    Args:
      requirements: what is compared, the width that the denoiser's config gives and the one that
        the other networks need.
    """
    for what, given, needed in requirements:
        if given != needed:
            raise InputError(
                f"the transformer's {what} = {given} does not fit the other networks, which need "
                f"{needed}"
            )


def model(
    configs: Mapping,
    networks: Mapping[str, Network],
    encode_text: Callable[..., Text],
    *,
    text_encoders: Sequence[str] = ("text_encoder",),
    channels: int,
    fixed: Mapping[str, Any] = MappingProxyType({}),
    options: Mapping[str, Any] = MappingProxyType({}),
    reference: Reference | None = None,
    **denoiser,
) -> Model:
    """Puts the networks of a transformer family together.

    Args:
      configs, networks: by component; the denoiser is "transformer", the autoencoder "vae".
      encode_text: maps (modules of the text encoders by component, what `Model.encode_text` gets,
        clip_skip) to `Text`.
      text_encoders: the components that encode prompts.
      channels: of the latents.
      fixed: as in `Denoiser`.
      options: further fields of `Model`.
      reference: as in `Denoiser`; the transformer is called with it as `reference`.
      **denoiser: further fields of `Denoiser`.
    """

    def encode(params: Params, tokens: Mapping, clip_skip: int) -> Text:
        modules = {name: networks[name](params[name]) for name in text_encoders}
        return encode_text(modules, tokens, clip_skip)

    evaluate = _evaluation(networks["transformer"], fixed)
    if reference is not None:
        evaluate = partial(_with_reference, evaluate)
    return Model(
        configs=configs,
        networks=networks,
        text_encoders=text_encoders,
        encode_text=encode,
        condition=_condition,
        denoiser=Denoiser(
            component="transformer",
            evaluate=evaluate,
            fixed=fixed,
            reference=reference,
            **denoiser,
        ),
        codec=codec(networks["vae"], configs["vae"], channels),
        **options,
    )


def _condition(text: Text, sizes: Array | None) -> dict[str, Array]:
    """Returns the arguments of the denoiser by name, without those that a family does not have."""
    named = {**text._asdict(), "sizes": sizes}
    return {name: value for name, value in named.items() if value is not None}


def _evaluation(network: Network, fixed: Mapping) -> Callable:
    """Returns `Denoiser.evaluate` for a network that is called with the conditioning by name."""

    def evaluate(
        params, latents, timesteps, conditioning, guidance_scale=None, kept=None, **options
    ):
        if guidance_scale is not None:
            options["guidance_scale"] = guidance_scale
        called = network(params)
        return called(latents, timesteps, **conditioning, **fixed, **options), None

    return evaluate


def _with_reference(evaluate: Callable, params: Params, latents: Array, *inputs, **options):
    """Evaluates the denoiser of latents that are followed by the channels of a reference."""
    latents, reference = jnp.split(latents, 2, axis=-1)
    return evaluate(params, latents, *inputs, reference=reference, **options)


CLIP_TEXT = Architecture(clip.CLIPTextConfig, clip.network, clip.SHARDING)
T5 = Architecture(t5.T5Config, lambda config: t5.T5EncoderModel, t5.SHARDING, tuple(t5.MODEL_TYPES))
QWEN3 = Architecture(qwen.Qwen3Config, lambda config: qwen.Qwen3Model, qwen.SHARDING)
AUTOENCODER_KL = Architecture(
    autoencoder_kl.AutoencoderKLConfig,
    lambda config: autoencoder_kl.AutoencoderKL,
    autoencoder_kl.SHARDING,
)


def codec(network: Network, config, channels: int) -> Codec:
    """Returns the codec of the autoencoder "vae", whose latents have these channels."""
    return Codec(
        component="vae",
        factor=config.factor,
        channels=channels,
        encode=partial(_encode, network),
        scale=config.scale,
        decode=partial(_decode, network, config),
    )


def _encode(network: Network, params: Params, images: Array) -> tuple[Array, Array]:
    return network(params).encode(images)


def _decode(network: Network, config, params: Params, latents: Array, dtype) -> Array:
    images = network(params).decode(config.unscale(latents).astype(dtype))
    return images.astype(jnp.float32)
