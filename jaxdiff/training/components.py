"""The model that a recipe trains: new, loaded from folders, or taken from a checkpoint."""

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
from jaxdiff.families.tokens import Tokenizer, of_checkpoint
from jaxdiff.training.loop import Params
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.weights.load import abstract_network, load_params, places
from jaxdiff.weights.save import save_pipeline


@dataclass(frozen=True)
class Components:
    """A complete text-to-image model.

    Attributes:
      model: its networks as pure functions.
      params: the float32 parameters of each network, by component.
      tokenizers: the tokenizer of each text encoder.
      tokenizer_folders: the folders that the tokenizers were read from.
      scheduler: the contents of `scheduler_config.json`.
      pipeline: the entries of `model_index.json` other than components.
    """

    model: Model
    params: dict[str, Params]
    tokenizers: dict[str, Tokenizer]
    tokenizer_folders: dict[str, Path]
    scheduler: dict
    pipeline: dict

    @property
    def family(self) -> Family:
        """Its model family."""
        return FAMILIES[self.pipeline["_class_name"]]

    @property
    def prediction_type(self) -> str:
        """The denoiser's prediction type, as in `objective.target`."""
        return scheduler_config.prediction_type(self.scheduler)

    @property
    def size_multiple(self) -> int:
        """The number of pixels that height and width must be multiples of in training."""
        return self.model.codec.factor * self.model.denoiser.size_multiple

    def save(self, directory: Path, params: Mapping[str, Params], dtype) -> None:
        """Writes the model as a diffusers directory, with `params` in place of its own."""
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
    """Loads a checkpoint, of any kind that `jaxdiff generate` supports, with float32 weights.

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
        tokenizers=of_checkpoint(checkpoint),
        tokenizer_folders=dict(checkpoint.tokenizers),
        scheduler=checkpoint.config("scheduler"),
        pipeline={
            key: value for key, value in checkpoint.index.items() if not isinstance(value, list)
        },
    )


def from_recipe(recipe: TextToImageRecipe) -> Components:
    """Makes the model that a recipe describes; missing parts come from the recipe's `model`.

    Raises:
      InputError: if a part is missing or cannot be read, or the parts do not fit together.
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
            raise InputError(f"the recipe sets neither {name} nor model; add one of them")
    if recipe.tokenizer:
        folders = {"text_encoder": Path(recipe.tokenizer)}
        config = configs["text_encoder"].to_json()
        tokenizers = {
            name: family.tokenizer(name, folder, config) for name, folder in folders.items()
        }
    known = scheduler_config.KEYS
    for key in recipe.scheduler.keys() - known - {"_class_name"}:
        hint = suggestion(key, known) or f"; known keys: {', '.join(sorted(known))}"
        raise InputError(f"the recipe's scheduler.{key}: unknown key{hint}")
    scheduler = scheduler | recipe.scheduler
    for name, value in (("tokenizer", tokenizers), ("scheduler", scheduler)):
        if not value:
            raise InputError(f"the recipe sets neither {name} nor model; add one of them")
    try:
        configs = {name: configs[name] for name in family.components if name in configs}
        model = family.networks().build(configs, pipeline, remat=recipe.computing.remat)
    except InputError as problem:
        raise InputError(f"the recipe's networks do not fit together: {problem}") from None
    return Components(model, params, tokenizers, folders, scheduler, pipeline)


def component(family: Family, name: str, given: dict | str, rngs: nnx.Rngs) -> tuple:
    """Makes a component from a config, or loads it from a folder.

    Args:
      family: the model family.
      name: the component's name.
      given: a parsed config for a new, untrained component, or the folder of a trained one.
      rngs: the random numbers for a new component.

    Returns:
      the config dataclass, the graph definition and the float32 parameters.

    Raises:
      InputError: if a file is missing or cannot be read, or the weights do not match the config.
    """
    if isinstance(given, str):
        return _read(family, name, Path(given))
    config = family.networks().read_configs({name: given})[name]
    graph, state = nnx.split(family.networks().module(name, config)(config, rngs=rngs))
    return config, graph, nnx.to_pure_dict(state)


def _read(family: Family, name: str, folder: Path) -> tuple:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path} is missing; set {name} to the folder of a trained {name}")
    config = family.networks().read_configs({name: read_json(path)})[name]
    graph, shapes = abstract_network(family.networks().module(name, config), config)
    files = family.components[name]
    weights = read_weights(files, folder / files.weights_file)
    return config, graph, load_params(places(shapes, jnp.float32), weights)
