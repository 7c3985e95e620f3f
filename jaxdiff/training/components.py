"""The model that a recipe trains: new, loaded from folders, or taken from a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.component import CONFIG, Component
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError, suggestion
from jaxdiff.families import FAMILIES, open_checkpoint
from jaxdiff.families.family import UNGUIDED, Family
from jaxdiff.families.model import Control, Model, networks_of
from jaxdiff.families.stable_diffusion import PIPELINE
from jaxdiff.families.tokenizers.tokenizer import Tokenizer, of_checkpoint
from jaxdiff.models.controlnet import ControlNetConfig
from jaxdiff.training.loop import Params
from jaxdiff.training.recipe import TextToImageRecipe
from jaxdiff.weights.load import load_params, name_of, places
from jaxdiff.weights.network import abstract_network
from jaxdiff.weights.save import save_pipeline

# The recipe's keys for components.
COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae")
# The layers of a new transformer that are zero at first: those that modulate its blocks, each of
# which so begins as the identity (adaLN-Zero: Peebles and Xie, 2022, arXiv:2212.09748, 3.2), and
# the last one.
ZERO_AT_FIRST = re.compile(r"(.*\.(norm|norm1|norm1_context)|norm_out)\.linear|proj_out")


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
      unguided: whether it was distilled to need no guidance.
      control, control_config: a ControlNet, whose parameters are "controlnet", and its config.
    """

    model: Model
    params: dict[str, Params]
    tokenizers: dict[str, Tokenizer]
    tokenizer_folders: dict[str, Path]
    scheduler: dict
    pipeline: dict
    unguided: bool = False
    control: Control | None = None
    control_config: ControlNetConfig | None = None

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

    @property
    def classifier_free(self) -> bool:
        """Whether its images are made with classifier-free guidance."""
        return not self.unguided and not self.model.denoiser.guidance_is_input

    def tokenized(self, texts: Sequence[str], *, negative: bool = False) -> dict[str, Any]:
        """Returns what each text encoder's tokenizer returns for texts."""
        return {name: each(texts, negative=negative) for name, each in self.tokenizers.items()}

    def save(self, directory: Path, params: Mapping[str, Params], dtype) -> None:
        """Writes the model as a diffusers directory, with `params` in place of its own."""
        left_out = {
            folder: [None, None]
            for name, files in self.family.components.items()
            for folder in (name, files.tokenizer)
            if files.optional and folder and name not in self.model.configs
        }
        save_pipeline(
            directory,
            components=self.family.components,
            configs=self.model.configs,
            params={**self.params, **params},
            scheduler=self.scheduler,
            tokenizers=self.tokenizer_folders,
            pipeline={**self.pipeline, **self.family.absent, **left_out},
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
        unguided=checkpoint.defaults.guidance == UNGUIDED,
    )


def from_recipe(recipe: TextToImageRecipe) -> Components:
    """Makes the model that a recipe describes; missing parts come from the recipe's `model`.

    Raises:
      InputError: if a part is missing or cannot be read, or the parts do not fit together.
    """
    base = load_model(recipe.model) if recipe.model else None
    pipeline = base.pipeline if base else {"_class_name": recipe.pipeline or PIPELINE}
    family = _family(recipe, pipeline["_class_name"])
    configs, params = (dict(base.model.configs), dict(base.params)) if base else ({}, {})
    rngs = nnx.Rngs(recipe.seed)
    for name, files in family.components.items():
        given = getattr(recipe, name, "")
        if given:
            configs[name], _, params[name] = component(family, name, given, rngs)
            _refuse_other_class(name, files, configs[name])
        elif name not in configs and not files.optional:
            raise InputError(f"the recipe sets neither {name} nor model; add one of them")
    tokenizers, folders = _tokenizers(recipe, family, configs, base)
    scheduler = _scheduler(recipe, base)
    configs = {name: configs[name] for name in family.components if name in configs}
    try:
        model = family.networks().build(configs, pipeline, remat=recipe.computing.remat)
    except InputError as problem:
        raise InputError(f"the recipe's networks do not fit together: {problem}") from None
    unguided = base.unguided if base else False
    return Components(model, params, tokenizers, folders, scheduler, pipeline, unguided)


def _family(recipe: TextToImageRecipe, pipeline: str) -> Family:
    """Returns the family of a pipeline's class; raises InputError if the recipe does not fit it."""
    if recipe.model and recipe.pipeline:
        raise InputError("pipeline has no effect with model, which has its own; leave it out")
    if pipeline not in FAMILIES:
        hint = suggestion(pipeline, FAMILIES) or f"; known: {', '.join(FAMILIES)}"
        raise InputError(f"pipeline = {pipeline!r} is not supported{hint}")
    components = FAMILIES[pipeline].components
    for name in COMPONENTS:
        if getattr(recipe, name) and name not in components:
            raise InputError(
                f"the recipe sets {name}, but a {pipeline} consists of {', '.join(components)}"
            )
    return FAMILIES[pipeline]


def _refuse_other_class(name: str, files: Component, config) -> None:
    """Raises InputError for a text encoder of another class than the pipeline's."""
    found = getattr(config, "architectures", (files.class_name,))
    if not {*found} <= {files.class_name, *files.other_class_names}:
        raise InputError(
            f"{name} is a {found[0]}, but the pipeline needs a {files.class_name}; use another one"
        )


def _tokenizers(
    recipe: TextToImageRecipe, family: Family, configs: Mapping, base: Components | None
) -> tuple[dict[str, Tokenizer], dict[str, Path]]:
    """Returns the tokenizer of each text encoder, and its folder."""
    if not recipe.tokenizer and base:
        return base.tokenizers, base.tokenizer_folders
    if not recipe.tokenizer:
        raise InputError("the recipe sets neither tokenizer nor model; add one of them")
    encoders = [name for name in configs if family.components[name].tokenizer]
    folders = dict.fromkeys(encoders, Path(recipe.tokenizer))
    tokenizers = {
        name: family.tokenizer(name, folder, configs[name].to_json())
        for name, folder in folders.items()
    }
    return tokenizers, folders


def _scheduler(recipe: TextToImageRecipe, base: Components | None) -> dict:
    """Returns the contents of `scheduler_config.json`."""
    known = scheduler_config.KEYS
    for key in recipe.scheduler.keys() - known - {"_class_name"}:
        hint = suggestion(key, known) or f"; known keys: {', '.join(sorted(known))}"
        raise InputError(f"the recipe's scheduler.{key}: unknown key{hint}")
    scheduler = (base.scheduler if base else {}) | recipe.scheduler
    if not scheduler:
        raise InputError("the recipe sets neither scheduler nor model; add one of them")
    return scheduler


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
    if family.components[name].library == "transformers":
        given = {"architectures": [family.components[name].class_name], **given}
    config = family.networks().read_configs({name: given})[name]
    graph, state = nnx.split(family.networks().module(name, config)(config, rngs=rngs))
    params = nnx.to_pure_dict(state)
    if name == "transformer":
        params = jax.tree_util.tree_map_with_path(_at_first, params)
    return config, graph, params


def _at_first(path, leaf: Array) -> Array:
    layer = name_of(path[:-1])
    return jnp.zeros_like(leaf) if ZERO_AT_FIRST.fullmatch(layer) else leaf


def _read(family: Family, name: str, folder: Path) -> tuple:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path} is missing; set {name} to the folder of a trained {name}")
    config = family.networks().read_configs({name: read_json(path)})[name]
    graph, shapes = abstract_network(family.networks().module(name, config), config)
    files = family.components[name]
    weights = read_weights(files, folder / files.weights_file)
    return config, graph, load_params(places(shapes, jnp.float32), weights)
