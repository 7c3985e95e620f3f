"""Opens checkpoints: their configs, tokenizers and the location of each weight. Imports no JAX.

A diffusers directory and a single file in the original naming give the same kind of `Checkpoint`.
What the networks are used for is defined in `families`, which are passed to this module.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jaxdiff.checkpoint import gguf_file, single_file, sources, upscaler
from jaxdiff.checkpoint.component import INDEX, TOKENIZER_FILES, Component, config_file
from jaxdiff.checkpoint.fingerprint import fingerprint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.lora_names import Layer
from jaxdiff.checkpoint.prediction import config_beside
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.checkpoint.tokenizer_files import check_tokenizer
from jaxdiff.checkpoint.weight_files import NoVariantError, choose, no_index, read_weights
from jaxdiff.checks import shown
from jaxdiff.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {file.parent.name: file.parent for file in sorted(ASSETS.glob(f"*/{INDEX}"))}
BUNDLED |= {file.stem: file for file in sorted(ASSETS.glob("*.safetensors"))}

SUFFIXES = (".safetensors", gguf_file.SUFFIX)  # of single files
SINGLE_FILE = "checkpoint.safetensors"  # the name of any single file within its checkpoint


class Family(Protocol):
    """The part of a model family that this module uses.

    Attributes:
      components: the networks of its pipelines, by folder.
      further_configs: further folders that hold a config and no weights, besides "scheduler".
      defaults: returns a checkpoint's properties and default settings.
      check_files: raises InputError for a checkpoint whose configs it cannot use.
      kohya_names: maps (checkpoint, network) to layers by their keys in the original code, which
        kohya's LoRA files use. Keys that the network lacks are ignored.
    """

    components: Mapping[str, Component]
    further_configs: tuple[str, ...]
    defaults: Callable[["Checkpoint"], Any]
    check_files: Callable[["Checkpoint"], None]
    kohya_names: Callable[["Checkpoint", str], Mapping[str, Layer]]


@dataclass(frozen=True)
class Checkpoint:
    """A complete pipeline on this machine; `families.open_checkpoint` makes it.

    Attributes:
      path: the diffusers directory, or the single file.
      name: "shapes64" for the bundled model, a Hub id, or the name of the directory or file.
      family: its model family.
      index: the parsed `model_index.json`.
      configs: the parsed config of each network, of "scheduler" and of what else the family has.
      tensors: for each network, the location of each weight by its key.
      tokenizers: the tokenizer folder of each text encoder.
      files: every file that affects the pixels, by its name within the checkpoint.
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
        """Returns the parsed config of a network or of a scheduler, as in the file."""
        return self.configs[component]

    def weights(self, network: str) -> dict[str, StoredTensor]:
        """Returns the location of each weight of a network by its diffusers or transformers key.

        The keys do not have the component's prefix.
        """
        return self.tensors[network]

    def tokenizer(self, text_encoder: str) -> Path:
        """Returns a text encoder's tokenizer folder."""
        return self.tokenizers[text_encoder]

    @property
    def pipeline(self) -> str:
        """The pipeline's class in diffusers."""
        return self.index["_class_name"]

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of its networks, which are also their folders."""
        return tuple(self.tensors)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the networks that encode text."""
        return tuple(self.tokenizers)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every file that affects the pixels, independent of the path."""
        return fingerprint(self.files)

    @cached_property
    def defaults(self):
        """Its default size, steps, sampler and so on; see `families.family.Defaults`."""
        return self.family.defaults(self)

    def place(self, component: str) -> Path:
        """Returns the file of a component's config, for messages."""
        return self.files.get(f"{component}/{config_file(component)}", self.path)


def open_checkpoint(
    model: str | Path,
    variant: str | None,
    families: Mapping[str, Family],
    base: str | Path | None = None,
) -> Checkpoint:
    """Opens a checkpoint, downloads it if necessary, and checks that it is complete.

    Args:
      model: a bundled model's name, such as "shapes64"; the path of a diffusers directory or of a
        single .safetensors or .gguf file; a Hub id, "owner/name" or "owner/name@revision"; or a URL
        that fsspec can open, such as "gs://bucket/name".
      variant: which weights to use, such as "fp16"; networks without this variant use their full
        weights. With None, networks without full weights use their fp16 or bf16 variant.
      families: the model families by the class of their pipelines in diffusers.
      base: for a single file without all networks, a model in the diffusers layout from which the
        others, the tokenizers and the scheduler are taken; `variant` is for its weights.

    Raises:
      InputError: if the pipeline's family is unknown, or a file is missing, truncated or invalid.
      NoVariantError: if no network has the variant; it is an InputError.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise InputError(f'variant {variant!r} must be a word like "fp16"')
    try:
        checkpoint = _open(model, variant, families, base)
        checkpoint.family.check_files(checkpoint)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        where = f"model {str(model)!r}" + (f" with --base {str(base)!r}" if base else "")
        raise InputError(f"{where} cannot be read ({reason})") from error
    return checkpoint


def _open(
    model: str | Path,
    variant: str | None,
    families: Mapping[str, Family],
    base: str | Path | None,
) -> Checkpoint:
    every = {name: it for family in families.values() for name, it in family.components.items()}
    path = BUNDLED.get(model) or sources.local_path(str(model), variant, every)
    if path.is_dir() and base is not None:
        raise InputError(
            f"model {str(model)!r} is a directory and needs no --base, which is for single files; "
            "leave it out"
        )
    if path.is_dir():
        return _open_directory(path, _name(str(model), path), variant, families)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise InputError(
            f"{path} is not a .safetensors or .gguf file, and other formats are not safe to read; "
            "convert it with PyTorch diffusers: "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...), or an upscaler "
            f'with PyTorch: python -c "{upscaler.CONVERT}"'
        )
    if path.is_file() and variant is not None and base is None:
        raise NoVariantError(f"{path} is a single file and has no variants; leave out --variant")
    if path.is_file():
        return _open_single_file(path, variant, families, base)
    raise InputError(
        f"model {str(model)!r} is neither a diffusers directory, a .safetensors file, a Hub id "
        f'("owner/name") nor a bundled model ({", ".join(BUNDLED)})'
    )


def _name(model: str, path: Path) -> str:
    """Returns the name to show for a directory that was opened as `model`."""
    if sources.URL.match(model):
        return model.rstrip("/").rpartition("/")[2]
    return path.resolve().name if Path(model).exists() else model


def _open_directory(
    path: Path,
    name: str,
    variant: str | None,
    families: Mapping[str, Family],
    only: Collection[str] | None = None,
) -> Checkpoint:
    """Opens a directory, with all networks or `only` with some."""
    if not (path / INDEX).exists():
        if (path.absolute().parent / INDEX).is_file():
            raise InputError(
                f"{path} contains no {INDEX} because it is a part of a model; use its parent "
                "directory"
            )
        raise InputError(no_index(str(path), "directory", _listing(path)))
    index = read_json(path / INDEX)
    family = _family(path / INDEX, index, families)
    networks = _networks(path / INDEX, index, family)
    if only is not None:
        networks = {name: it for name, it in networks.items() if name in only}
    folders = {network: _listing(path / network) for network in networks}
    chosen = choose(folders, variant, path, networks)
    tensors = {
        network: read_weights(networks[network], path / network / file)
        for network, file in chosen.items()
    }
    tokenizers = _tokenizers(networks, lambda _, folder: path / folder)
    described = (*networks, "scheduler", *family.further_configs)
    configs = {name: f"{name}/{config_file(name)}" for name in described}
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


def _open_single_file(
    path: Path, variant: str | None, families: Mapping[str, Family], base: str | Path | None
) -> Checkpoint:
    found = single_file.read(path)
    family = _family(path, found.index, families)
    lacking = [name for name in family.components if name not in found.weights]
    if base is not None:
        if not found.base or not lacking:
            raise InputError(f"{path} lacks no part of {found.name}; leave out --base")
        added = _open_base(base, variant, families, family, lacking)
        return _completed(path, family, found, added)
    needed = [name for name in lacking if not family.components[name].optional]
    if needed:
        raise InputError(
            f"{path} is {found.name} without {', '.join(needed)}; take them from another model: "
            f"--base {found.base}, or a local diffusers directory"
        )
    networks = {name: it for name, it in family.components.items() if name in found.weights}

    def tokenizer(network: str, folder: str) -> Path:
        beside = path.parent / folder
        return beside if os.path.lexists(beside) else _hub_tokenizer(path, folder, found, network)

    tokenizers = _tokenizers(networks, tokenizer)
    files = {SINGLE_FILE: path}
    if found.configs["scheduler"].get("prediction_type") == "v_prediction":
        beside = config_beside(path)  # which may be where that is written
        files |= {"checkpoint.yaml": beside} if beside else {}
    return Checkpoint(
        path=path,
        name=path.stem,
        family=family,
        index=found.index,
        configs=found.configs,
        tensors={network: found.weights[network] for network in networks},
        tokenizers=tokenizers,
        files=files | _tokenizer_files(networks, tokenizers),
    )


def _open_base(
    base: str | Path,
    variant: str | None,
    families: Mapping[str, Family],
    family: Family,
    lacking: Collection[str],
) -> Checkpoint:
    """Opens the networks that a single file lacks, as far as the base has them."""
    # Tokenizers are also for text encoders that the file has.
    wanted = {name: it for name, it in family.components.items() if name in lacking or it.tokenizer}
    path = sources.local_path(str(base), variant, wanted)
    if not path.is_dir():
        raise InputError(f"--base {str(base)!r} is not a diffusers directory or a Hub id; name one")
    same = {name: it for name, it in families.items() if it is family}
    return _open_directory(path, str(base), variant, same, only=lacking)


def _completed(
    path: Path, family: Family, found: single_file.SingleFile, added: Checkpoint
) -> Checkpoint:
    """Returns what a single file and its base make together."""
    weights = found.weights | added.tensors
    networks = {name: it for name, it in family.components.items() if name in weights}
    tokenizers = _tokenizers(networks, lambda _, folder: added.path / folder)
    return Checkpoint(
        path=path,
        name=path.stem,
        family=family,
        index=added.index | {name: found.index[name] for name in found.weights},
        configs=found.configs | added.configs,
        tensors={name: weights[name] for name in networks},
        tokenizers=tokenizers,
        files={SINGLE_FILE: path} | added.files | _tokenizer_files(networks, tokenizers),
    )


def _hub_tokenizer(
    path: Path, folder: str, found: single_file.SingleFile, text_encoder: str
) -> Path:
    try:
        return sources.hub_tokenizer(*found.tokenizers[text_encoder])
    except InputError as error:
        raise InputError(
            f"{path} contains no tokenizer, and none could be fetched from the Hub ({error}); put "
            f"the folder {folder!r} of a diffusers directory of the same family next to the file"
        ) from error


def _listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _family(path: Path, index: dict, families: Mapping[str, Family]) -> Family:
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in families:
        raise InputError(
            f"{path}: {shown(pipeline)} is not supported; use a checkpoint of {', '.join(families)}"
        )
    return families[pipeline]


def _networks(path: Path, index: dict, family: Family) -> dict[str, Component]:
    """Returns the networks in a `model_index.json`; raises InputError if one is not supported."""
    networks = {}
    for name, component in family.components.items():
        found = index.get(name)
        if component.optional and found in (None, [None, None]):
            continue
        classes = (component.class_name, *component.other_class_names)
        wanted = [[component.library, each] for each in classes]
        if found not in wanted:
            raise InputError(
                f"{path}: {name} is {shown(found)}, but only {' or '.join(map(str, wanted))} is "
                "supported; use another model"
            )
        networks[name] = component
    return networks


def _tokenizers(
    networks: Mapping[str, Component], place: Callable[[str, str], Path]
) -> dict[str, Path]:
    """Returns each text encoder's tokenizer folder; `place` maps (encoder, folder name) to it."""
    return {name: place(name, it.tokenizer) for name, it in networks.items() if it.tokenizer}


def _tokenizer_files(
    networks: Mapping[str, Component], tokenizers: dict[str, Path]
) -> dict[str, Path]:
    """Returns the tokenizers' files by their names in a checkpoint, after checking them."""
    files = {}
    for network, folder in tokenizers.items():
        check_tokenizer(folder)
        name = networks[network].tokenizer
        found = {f"{name}/{file}": folder / file for file in TOKENIZER_FILES}
        files |= {name: path for name, path in found.items() if path.is_file()}
    return files
