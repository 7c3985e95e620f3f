"""Finds the safetensors files of each network and the location of each weight. Imports no JAX.

File names are those of diffusers and transformers: one file, or shards with an index, either of
which may be of a variant such as "fp16".
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxdiff.checkpoint.component import CONFIG_ONLY, INDEX, TOKENIZER_FILES, Component, config_file
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.safetensors_header import (
    ITEM_BYTES,
    MAX_NAME_CHARACTERS,
    read_header,
)
from jaxdiff.checkpoint.scaled_weights import with_scales
from jaxdiff.checkpoint.tensors import FLOATS, SHOWN, StoredTensor
from jaxdiff.checks import shown
from jaxdiff.errors import InputError

OTHER_VARIANTS = ("fp16", "bf16")  # used in this order if there are no full weights
UNREADABLE = (".bin", ".bin.index.json", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")


class NoVariantError(InputError):
    """No network of a checkpoint has the requested variant."""


def choose(
    folders: dict[str, Collection[str]],
    variant: str | None,
    where: str | Path,
    components: Mapping[str, Component],
) -> dict[str, str]:
    """Chooses each network's weights: the name of its weights file, or of its shards' index.

    Args:
      folders: for each network, the names of the files in its folder.
      variant: such as "fp16", which networks without it replace by their full weights; None uses
        full weights or, if a network has none, its float16 or bfloat16 variant.
      where: the folders' parent, for messages.
      components: the networks, by folder.

    Raises:
      InputError: if a network has no readable weights.
      NoVariantError: if no network has the variant.
    """
    stems = {network: components[network].stem for network in folders}
    if variant and not any(
        name in folders[network]
        for network, stem in stems.items()
        for name in (_single(stem, variant), _index(stem, variant))
    ):
        raise NoVariantError(
            f"{where} has no weights of the variant {variant!r}; leave out --variant"
        )
    chosen = {}
    for network, names in folders.items():
        stem = stems[network]
        wanted = [variant, None] if variant else [None, *OTHER_VARIANTS]
        known = [name for kind in wanted for name in (_single(stem, kind), _index(stem, kind))]
        found = [name for name in known if name in names]
        if not found:
            raise InputError(_no_weights(f"{where}/{network}", stem, names))
        chosen[network] = found[0]
    return chosen


def wanted_files(
    names: Collection[str], variant: str | None, where: str, components: Mapping[str, Component]
) -> list[str]:
    """Returns those of a remote checkpoint's files (relative names) that have to be fetched."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, plain = name.rpartition("/")
        folders.setdefault(folder, []).append(plain)
    known = [INDEX, *(f"{name}/{config_file(name)}" for name in (*components, *CONFIG_ONLY))]
    known += [f"{folder}/{name}" for folder in tokenizers(components) for name in TOKENIZER_FILES]
    wanted = [name for name in known if name in names]
    networks = {network: folders[network] for network in components if network in folders}
    for network, main in choose(networks, variant, where, components).items():
        wanted += [f"{network}/{main}"]
        if main.endswith(".json"):
            wanted += [f"{network}/{name}" for name in networks[network] if _is_shard(name, main)]
    return wanted


def tokenizers(components: Mapping[str, Component]) -> list[str]:
    """Returns the components' tokenizer folders."""
    return [each.tokenizer for each in components.values() if each.tokenizer]


def no_index(where: str, kind: str, names: Collection[str]) -> str:
    """Explains why a "directory" or "repository" without `INDEX` cannot be opened."""
    problem = f"{where} contains no {INDEX}, so it is not a diffusers {kind}"
    if "config.json" in names:
        return f"{problem} but a single network; use a whole model"
    single = sorted(name for name in names if name.endswith(".safetensors"))
    if single:
        return f"{problem}; use a local copy of a single file: {', '.join(single[:SHOWN])}"
    return f"{problem}; use another one"


def read_weights(component: Component, path: Path) -> dict[str, StoredTensor]:
    """Returns the location of each weight of a network, by its plain key.

    Args:
      component: the network.
      path: its weights file, or the index of its shards.

    Raises:
      InputError: if a file is missing, truncated or contradicts the index, or a weight is not
        stored as floating-point numbers.
    """
    stored = read_header(path) if path.suffix == ".safetensors" else _read_shards(path)
    stored = with_scales(stored)
    weights = {}
    for key, tensor in stored.items():
        plain = component.plain_key(key.removeprefix(component.prefix))
        if plain is None or component.tied.get(plain) in stored:
            continue
        plain = component.tied.get(plain, plain)
        if plain in weights:
            raise InputError(f"{tensor.file} contains {key} twice; copy the checkpoint again")
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{tensor.file}: {key} is stored as {tensor.dtype}; only {', '.join(FLOATS)} "
                "are supported"
            )
        weights[plain] = component.plain_tensor(tensor)
    if not weights:
        raise InputError(f"{path} contains no weights; copy the checkpoint again")
    return weights


def _read_shards(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path} has no weight_map; copy it again")
    for name in places.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(
                f"{path} names {shown(name)}, which is not a safetensors file in the same folder; "
                "do not use this checkpoint"
            )
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        for key, tensor in read_header(path.with_name(name)).items():
            if key in stored:
                raise InputError(
                    f"{tensor.file}: {key} is also in {stored[key].file.name}; copy the checkpoint "
                    "again"
                )
            stored[key] = tensor
    for key in [*places, *stored]:
        if key not in stored or stored[key].file.name != places.get(key):
            listed = f"in {places[key]}" if key in places else "in no file"
            found = f"in {stored[key].file.name}" if key in stored else "missing"
            raise InputError(
                f"{path}: {key[:MAX_NAME_CHARACTERS]} should be {listed} but is {found}; "
                "copy the checkpoint again"
            )
    metadata = index.get("metadata")
    expected = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.size * ITEM_BYTES[tensor.dtype] for tensor in stored.values())
    if expected is not None and expected != total:
        raise InputError(
            f"{path}: the weights should have {shown(expected)} bytes but have {total}; copy the "
            "checkpoint again"
        )
    return stored


def _single(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def _is_shard(name: str, index: str) -> bool:
    """Whether the index could list a file of this name."""
    stem, variant = re.fullmatch(r"(.+)\.safetensors\.index(\..+)?\.json", index).groups("")
    part = r"-\d+-of-\d+"
    orders = variant + part, part + variant  # current and older order
    return any(re.fullmatch(rf"{re.escape(stem)}{o}\.safetensors", name) for o in orders)


def _no_weights(folder: str, stem: str, names: Collection[str]) -> str:
    variants = {
        found[1]
        for name in names
        if (found := re.fullmatch(rf"{stem}\.(\w+)(-\d+-of-\d+)?\.safetensors", name))
    }
    if variants:
        return f"{folder} has only the variants {', '.join(sorted(variants))}; choose a --variant"
    others = sorted(name for name in names if name.endswith(UNREADABLE))
    if others:
        return (
            f"{folder} contains {others[0]} but no safetensors file, and other formats are not "
            "safe to read; convert the checkpoint with PyTorch diffusers: "
            "pipeline.save_pretrained(DIRECTORY, safe_serialization=True)"
        )
    return f"{folder}/{stem}.safetensors is missing; copy the checkpoint again"
