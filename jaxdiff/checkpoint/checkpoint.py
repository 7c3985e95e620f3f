"""A checkpoint: its configs, the places of its weights, its tokenizers. Imports no JAX.

A diffusers directory and a single file in the original naming are the same thing to their users.
What the weights are for is the affair of `families`, whose pages this module is given.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jaxdiff.checkpoint import single_file, sources
from jaxdiff.checkpoint.component import INDEX, TOKENIZER_FILES, Component, config_file
from jaxdiff.checkpoint.fingerprint import fingerprint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.checkpoint.tokenizer_files import check_tokenizer
from jaxdiff.checkpoint.weight_files import NoVariantError, choose, no_index, read_weights
from jaxdiff.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {file.parent.name: file.parent for file in sorted(ASSETS.glob(f"*/{INDEX}"))}


class Family(Protocol):
    """What this module asks of a page of `families`.

    Attributes:
      components: the networks of its pipelines, by their folders.
      defaults: what a checkpoint of it makes when nothing else is asked for.
      check_files: raises InputError for a checkpoint whose configs it cannot use.
      kohya_names: the names by which kohya's LoRA files call a network's layers, as far as they are
        not ours, and our keys: (checkpoint, component) to a dictionary.
    """

    components: Mapping[str, Component]
    defaults: Callable[["Checkpoint"], Any]
    check_files: Callable[["Checkpoint"], None]
    kohya_names: Callable[["Checkpoint", str], Mapping[str, str]]


@dataclass(frozen=True)
class Checkpoint:
    """A complete pipeline on this machine; `families.open_checkpoint` makes it.

    Attributes:
      path: the diffusers directory, or the single file.
      name: "shapes64" for the bundled model, a Hub id, or the directory's or file's own name.
      family: the page of `families` that reads it.
      index: the parsed `model_index.json`.
      configs: the parsed configs, by component: the networks, and "scheduler".
      tensors: by network, where each weight lies.
      tokenizers: by text encoder, the folder of the tokenizer that feeds it.
      files: every file that decides pixels, by its name within the checkpoint.
    """

    path: Path
    name: str
    family: Family
    index: dict
    configs: dict[str, dict]
    tensors: dict[str, dict[str, StoredTensor]]
    tokenizers: dict[str, Path]
    files: dict[str, Path]

    def config(self, component: str) -> dict:
        """The parsed config of a network or of "scheduler", as the file says it."""
        return self.configs[component]

    def weights(self, network: str) -> dict[str, StoredTensor]:
        """Where each weight of a network lies, by diffusers' or transformers' key.

        Keys are without their component's prefix.
        """
        return self.tensors[network]

    def tokenizer(self, text_encoder: str) -> Path:
        """The folder of the tokenizer that feeds a text encoder."""
        return self.tokenizers[text_encoder]

    @property
    def pipeline(self) -> str:
        """The class of the pipeline in diffusers."""
        return self.index["_class_name"]

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of its networks, which are those of their folders."""
        return tuple(self.tensors)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Of the networks those that encode text."""
        return tuple(self.tokenizers)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every file that decides pixels, whatever the checkpoint is called."""
        return fingerprint(self.files)

    @cached_property
    def defaults(self):
        """Its size, steps, sampler and so on: see `families.family.Defaults`."""
        return self.family.defaults(self)

    def place(self, component: str) -> Path:
        """The file of a component's config, for messages."""
        return self.files.get(f"{component}/{config_file(component)}", self.path)


def open_checkpoint(
    model: str | Path, variant: str | None, families: Mapping[str, Family]
) -> Checkpoint:
    """Finds a checkpoint, fetches it if it is elsewhere, and checks that it is complete.

    Args:
      model: a bundled model's name, such as "shapes64"; the path of a diffusers directory or of a
        single .safetensors file; a Hub id, "owner/name" or "owner/name@revision"; or a URL that
        fsspec opens, such as "gs://bucket/name".
      variant: which weights, such as "fp16". A network without them gives its full ones; without
        a variant asked for, a network without full ones gives its fp16 or bf16 ones.
      families: by the pipelines' classes.

    Raises:
      InputError: for a pipeline of no family, or a file that is missing, cut short
        or not what it should be; NoVariantError, which is one, where nothing has the variant.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise InputError(f'variant {variant!r} must be a word like "fp16"')
    try:
        checkpoint = _open(model, variant, families)
        checkpoint.family.check_files(checkpoint)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"model {str(model)!r} cannot be read ({reason})") from error
    return checkpoint


def _open(model: str | Path, variant: str | None, families: Mapping[str, Family]) -> Checkpoint:
    every = {name: it for family in families.values() for name, it in family.components.items()}
    path = BUNDLED.get(model) or sources.local_path(str(model), variant, every)
    if path.is_dir():
        return _open_directory(path, _name(str(model), path), variant, families)
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(
            f"{path} is no .safetensors file, and nothing else is safe to read; convert it with "
            "PyTorch diffusers: StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    if path.is_file() and variant is not None:
        raise NoVariantError(f"{path} is a single file and has no variants; ask for none")
    if path.is_file():
        return _open_single_file(path, families)
    raise InputError(
        f"model {str(model)!r} is neither a diffusers directory, nor a .safetensors file, nor a "
        f'Hub id ("owner/name"), nor bundled ({", ".join(BUNDLED)})'
    )


def _name(model: str, path: Path) -> str:
    """What people call a directory that they asked for as `model`."""
    if sources.URL.match(model):
        return model.rstrip("/").rpartition("/")[2]
    return path.resolve().name if Path(model).exists() else model


def _open_directory(
    path: Path, name: str, variant: str | None, families: Mapping[str, Family]
) -> Checkpoint:
    if not (path / INDEX).exists():
        if (path.absolute().parent / INDEX).is_file():
            raise InputError(f"{path} holds no {INDEX}: it is a part of a model; name its parent")
        raise InputError(no_index(str(path), "directory", _listing(path)))
    index = read_json(path / INDEX)
    family = _family(path / INDEX, index, families)
    networks = _networks(path / INDEX, index, family)
    folders = {network: _listing(path / network) for network in networks}
    chosen = choose(folders, variant, path, networks)
    tensors = {
        network: read_weights(networks[network], path / network / file)
        for network, file in chosen.items()
    }
    tokenizers = _tokenizers(networks, lambda _, folder: path / folder)
    configs = {name: f"{name}/{config_file(name)}" for name in (*networks, "scheduler")}
    decisive = {INDEX, *configs.values()} | {
        f"{network}/{tensor.file.name}"
        for network, weights in tensors.items()
        for tensor in weights.values()
    }
    parsed = {component: read_json(path / file) for component, file in configs.items()}
    return Checkpoint(
        path=path,
        name=name,
        family=family,
        index=index,
        configs=parsed,
        tensors=tensors,
        tokenizers=tokenizers,
        files={file: path / file for file in decisive} | _tokenizer_files(networks, tokenizers),
    )


def _open_single_file(path: Path, families: Mapping[str, Family]) -> Checkpoint:
    found = single_file.read(path)
    family = families[found.index["_class_name"]]
    networks = {name: it for name, it in family.components.items() if name in found.weights}
    tensors = {network: found.weights[network] for network in networks}

    def tokenizer(network: str, folder: str) -> Path:
        beside = path.parent / folder
        return beside if beside.is_dir() else _hub_tokenizer(path, folder, found, network)

    tokenizers = _tokenizers(networks, tokenizer)
    return Checkpoint(
        path=path,
        name=path.stem,
        family=family,
        index=found.index,
        configs=found.configs,
        tensors=tensors,
        tokenizers=tokenizers,
        files={"checkpoint.safetensors": path} | _tokenizer_files(networks, tokenizers),
    )


def _hub_tokenizer(
    path: Path, folder: str, found: single_file.SingleFile, text_encoder: str
) -> Path:
    try:
        return sources.hub_tokenizer(*found.tokenizers[text_encoder])
    except InputError as error:
        raise InputError(
            f"{path} holds no tokenizer: put the folder {folder!r} of a diffusers directory of the "
            f"same family beside it; or from the Hub: {error}"
        ) from error


def _listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _family(path: Path, index: dict, families: Mapping[str, Family]) -> Family:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in families:
        raise InputError(
            f"{path}: {pipeline} is not supported; name a checkpoint of {', '.join(families)}"
        )
    return families[pipeline]


def _networks(path: Path, index: dict, family: Family) -> dict[str, Component]:
    """The networks that a `model_index.json` lists, if they are a pipeline that can be run."""
    networks = {}
    for name, component in family.components.items():
        said = index.get(name)
        if component.optional and said in (None, [None, None]):
            continue
        wanted = [component.library, component.class_name]
        if said != wanted:
            raise InputError(f"{path}: {name} is {said}, only {wanted} is supported")
        networks[name] = component
    return networks


def _tokenizers(
    networks: Mapping[str, Component], place: Callable[[str, str], Path]
) -> dict[str, Path]:
    """The folder of each text encoder's tokenizer; `place` finds it by the encoder and its name."""
    return {name: place(name, it.tokenizer) for name, it in networks.items() if it.tokenizer}


def _tokenizer_files(
    networks: Mapping[str, Component], tokenizers: dict[str, Path]
) -> dict[str, Path]:
    """The tokenizers' files by their names in a checkpoint, if they are whole."""
    files = {}
    for network, folder in tokenizers.items():
        check_tokenizer(folder)
        name = networks[network].tokenizer
        found = {f"{name}/{file}": folder / file for file in TOKENIZER_FILES}
        files |= {name: path for name, path in found.items() if path.is_file()}
    return files
