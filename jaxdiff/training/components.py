"""The model that a recipe trains: made anew, loaded from folders, or taken from a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jaxdiff.checkpoint.component import CONFIG
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError, suggestion
from jaxdiff.families import FAMILIES, open_checkpoint
from jaxdiff.families.family import Family
from jaxdiff.families.model import Model, networks_of
from jaxdiff.families.stable_diffusion import PIPELINE
from jaxdiff.families.tokens import Tokenizer
from jaxdiff.training.loop import Params
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.weights.load import abstract_network, load_params, places
from jaxdiff.weights.save import save_pipeline


@dataclass(frozen=True)
class Components:
    """A whole text-to-image model.

    Attributes:
      model: its networks as pure functions.
      params: of each network, by component; float32.
      tokenizers: of each text encoder.
      tokenizer_folders: where those were read.
      scheduler: the keys of `scheduler_config.json`.
      pipeline: the entries of `model_index.json` beside its components.
    """

    model: Model
    params: dict[str, Params]
    tokenizers: dict[str, Tokenizer]
    tokenizer_folders: dict[str, Path]
    scheduler: dict
    pipeline: dict

    @property
    def family(self) -> Family:
        """The page of its family."""
        return FAMILIES[self.pipeline["_class_name"]]

    @property
    def prediction_type(self) -> str:
        """As in `objective.target`."""
        return scheduler_config.prediction_type(self.scheduler)

    @property
    def size_multiple(self) -> int:
        """What heights and widths are multiples of in training, in pixels."""
        return self.model.codec.factor * self.model.denoiser.size_multiple

    def save(self, directory: Path, params: Mapping[str, Params], dtype) -> None:
        """Writes the model with these parameters in place of its own, as a diffusers directory."""
        save_pipeline(
            directory,
            components=self.family.components,
            configs=self.model.configs,
            params={**self.params, **params},
            scheduler=self.scheduler,
            tokenizers=self.tokenizer_folders,
            pipeline={**self.pipeline, **self.family.absent},
            dtype=dtype,
        )


def load_model(model: str) -> Components:
    """Loads a checkpoint that `jaxdiff generate` could use, its weights in float32.

    Raises:
      InputError: if it cannot be read.
    """
    checkpoint = open_checkpoint(model)
    built = networks_of(checkpoint)
    return Components(
        built,
        params={
            name: load_params(places(network.shapes, jnp.float32), checkpoint.weights(name))
            for name, network in built.networks.items()
        },
        tokenizers={
            name: Tokenizer(checkpoint.tokenizer(name), built.positions[name])
            for name in built.text_encoders
        },
        tokenizer_folders=dict(checkpoint.tokenizers),
        scheduler=checkpoint.config("scheduler"),
        pipeline={
            key: value for key, value in checkpoint.index.items() if not isinstance(value, list)
        },
    )


def from_recipe(recipe: TextToImageRecipe) -> Components:
    """Makes the model that the recipe names; what it leaves out comes from its `model`.

    Raises:
      InputError: naming what is missing, cannot be read, or does not fit.
    """
    configs, params, tokenizers, folders, scheduler = {}, {}, {}, {}, {}
    pipeline = {"_class_name": PIPELINE}
    if recipe.model:
        base = load_model(recipe.model)
        configs, params = dict(base.model.configs), dict(base.params)
        tokenizers, folders = base.tokenizers, base.tokenizer_folders
        scheduler, pipeline = base.scheduler, base.pipeline
    family = FAMILIES[pipeline["_class_name"]]
    rngs = nnx.Rngs(recipe.seed)
    for name in ("text_encoder", "unet", "vae"):
        given = getattr(recipe, name)
        if given:
            configs[name], _, params[name] = component(family, name, given, rngs)
        elif name not in configs:
            raise InputError(f"the recipe names no {name}, and no model to take it from")
    if recipe.tokenizer:
        positions = configs["text_encoder"].max_position_embeddings
        tokenizers = {"text_encoder": Tokenizer(Path(recipe.tokenizer), positions)}
        folders = {"text_encoder": Path(recipe.tokenizer)}
    known = scheduler_config.KEYS
    for key in recipe.scheduler.keys() - known - {"_class_name"}:
        hint = suggestion(key, known) or f"; known keys: {', '.join(sorted(known))}"
        raise InputError(f"the recipe's scheduler.{key} is not known{hint}")
    scheduler = scheduler | recipe.scheduler
    for name, value in (("tokenizer", tokenizers), ("scheduler", scheduler)):
        if not value:
            raise InputError(f"the recipe names no {name}, and no model to take it from")
    try:
        configs = {name: configs[name] for name in family.components if name in configs}
        model = family.build(configs, pipeline, remat=recipe.computing.remat)
    except InputError as problem:
        raise InputError(f"the recipe's networks do not fit one another: {problem}") from None
    return Components(model, params, tokenizers, folders, scheduler, pipeline)


def component(family: Family, name: str, given: dict | str, rngs: nnx.Rngs) -> tuple:
    """Makes a component anew from a table, or loads it from a folder.

    Returns:
      its config, its graph and its float32 parameters.

    Raises:
      InputError: naming what is missing, cannot be read, or does not fit.
    """
    if isinstance(given, str):
        return _read(family, name, Path(given))
    config = family.read_configs({name: given})[name]
    graph, state = nnx.split(family.module(name, config)(config, rngs=rngs))
    return config, graph, nnx.to_pure_dict(state)


def _read(family: Family, name: str, folder: Path) -> tuple:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path} is missing: name the folder of a trained {name}")
    config = family.read_configs({name: read_json(path)})[name]
    graph, shapes = abstract_network(family.module(name, config), config)
    files = family.components[name]
    weights = read_weights(files, folder / files.weights_file)
    return config, graph, load_params(places(shapes, jnp.float32), weights)
