"""The networks that a recipe names: made anew, loaded from a folder, or taken from a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jaxdiff.checkpoint.checkpoint import PIPELINE, open_checkpoint
from jaxdiff.checkpoint.components import CONFIGS, NETWORKS, read_json
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.diffusion.schedule import FLOW_CLASS, KEYS
from jaxdiff.errors import InputError, meant
from jaxdiff.families.networks import CONFIGS as CONFIG_CLASSES
from jaxdiff.families.networks import read_configs
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL
from jaxdiff.models.text import clip
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.training.loop import Params
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.training.tokenizer import Tokenizer
from jaxdiff.weights import load


@dataclass(frozen=True)
class Components:
    """A whole text-to-image model.

    Attributes:
      configs, graphs, params: of each network, by component; the parameters float32.
      tokenizers: of each text encoder.
      tokenizer_folders: where those were read.
      scheduler: the keys of `scheduler_config.json`.
      pipeline: what `model_index.json` says beside its components.
    """

    configs: dict
    graphs: dict[str, nnx.GraphDef]
    params: dict[str, Params]
    tokenizers: dict[str, Tokenizer]
    tokenizer_folders: dict[str, Path]
    scheduler: dict
    pipeline: dict

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode text, in the order of their vectors."""
        return tuple(self.tokenizers)

    @property
    def prediction_type(self) -> str:
        """As in `objective.target`."""
        if self.scheduler.get("_class_name") == FLOW_CLASS:
            return "flow"
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def size_multiple(self) -> int:
        """What heights and widths are multiples of in training, in pixels."""
        return self.configs["vae"].factor * self.configs["unet"].factor

    def save(self, directory: Path, params: Mapping[str, Params], dtype) -> None:
        """Writes the model with these parameters in place of its own, as a diffusers directory."""
        load.save_pipeline(
            directory,
            configs=self.configs,
            params={**self.params, **params},
            scheduler=self.scheduler,
            tokenizers=self.tokenizer_folders,
            pipeline=self.pipeline,
            dtype=dtype,
        )


def load_model(model: str) -> Components:
    """A checkpoint that `jaxdiff generate` could use, its weights in float32.

    Raises:
      InputError: if it cannot be read.
    """
    checkpoint = open_checkpoint(model)
    configs = read_configs(checkpoint)
    graphs, params = {}, {}
    for name, config in configs.items():
        graphs[name], shapes = load.abstract_network(_class(name, config), config)
        params[name] = load.load_params(shapes, checkpoint.weights(name), jnp.float32)
    return Components(
        configs,
        graphs,
        params,
        tokenizers={
            name: Tokenizer(checkpoint.tokenizer(name), configs[name].max_position_embeddings)
            for name in checkpoint.text_encoders
        },
        tokenizer_folders=dict(checkpoint.tokenizers),
        scheduler=checkpoint.config("scheduler"),
        pipeline={key: said for key, said in checkpoint.index.items() if not _is_component(said)},
    )


def from_recipe(recipe: TextToImageRecipe) -> Components:
    """The components that the recipe names, those of its `model` where it names none.

    Raises:
      InputError: naming what is missing, cannot be read, or does not fit.
    """
    configs, graphs, params, tokenizers, folders, scheduler = {}, {}, {}, {}, {}, {}
    pipeline = {"_class_name": PIPELINE}
    if recipe.model:
        base = load_model(recipe.model)
        configs, graphs, params = dict(base.configs), dict(base.graphs), dict(base.params)
        tokenizers, folders = base.tokenizers, base.tokenizer_folders
        scheduler, pipeline = base.scheduler, base.pipeline
    rngs = nnx.Rngs(recipe.seed)
    for name in ("text_encoder", "unet", "vae"):
        said = getattr(recipe, name)
        if said:
            configs[name], graphs[name], params[name] = component(name, said, rngs)
        elif name not in configs:
            raise InputError(f"the recipe names no {name}, and no model to take it from")
    if recipe.computing.remat:
        frugal = partial(UNet2DConditionModel, remat=True)
        graphs["unet"], _ = load.abstract_network(frugal, configs["unet"])
    if recipe.tokenizer:
        positions = configs["text_encoder"].max_position_embeddings
        tokenizers = {"text_encoder": Tokenizer(Path(recipe.tokenizer), positions)}
        folders = {"text_encoder": Path(recipe.tokenizer)}
    for key in recipe.scheduler.keys() - KEYS - {"_class_name"}:
        hint = meant(key, KEYS) or f"; it has {', '.join(sorted(KEYS))}"
        raise InputError(f"the recipe's scheduler.{key} is not known{hint}")
    scheduler = scheduler | recipe.scheduler
    for name, value in (("tokenizer", tokenizers), ("scheduler", scheduler)):
        if not value:
            raise InputError(f"the recipe names no {name}, and no model to take it from")
    _refuse_misfits(configs, tuple(tokenizers))
    return Components(configs, graphs, params, tokenizers, folders, scheduler, pipeline)


def component(name: str, said: dict | str, rngs: nnx.Rngs) -> tuple:
    """A component made anew by the table `said`, or loaded from that folder.

    Returns:
      its config, its graph and its float32 parameters.

    Raises:
      InputError: naming what is missing, cannot be read, or does not fit.
    """
    if isinstance(said, str):
        return _read(name, Path(said))
    config = CONFIG_CLASSES[name].from_json(said)
    graph, state = nnx.split(_class(name, config)(config, rngs=rngs))
    return config, graph, nnx.to_pure_dict(state)


def _is_component(said) -> bool:
    return isinstance(said, list)


def _class(name: str, config):
    match name:
        case "unet":
            return UNet2DConditionModel
        case "vae":
            return AutoencoderKL
        case _:
            return clip.network(config)


def _read(name: str, folder: Path) -> tuple:
    path = folder / CONFIGS[name]
    if not path.is_file():
        raise InputError(f"{path} is missing: name the folder of a trained {name}")
    config = CONFIG_CLASSES[name].from_json(read_json(path))
    graph, shapes = load.abstract_network(_class(name, config), config)
    weights = read_weights(name, folder / NETWORKS[name][2])
    return config, graph, load.load_params(shapes, weights, jnp.float32)


def _refuse_misfits(configs: dict, text_encoders: tuple[str, ...]) -> None:
    unet, channels = configs["unet"], configs["vae"].latent_channels
    width = sum(configs[name].hidden_size for name in text_encoders)
    for ours, name, theirs in (
        (unet.in_channels, "vae.latent_channels", channels),
        (unet.out_channels, "vae.latent_channels", channels),
        (unet.cross_attention_dim, "text_encoder.hidden_size", width),
    ):
        if ours != theirs:
            raise InputError(
                f"the recipe's unet is made for a {name} of {ours}, but it is {theirs}"
            )
