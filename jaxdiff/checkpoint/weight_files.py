"""Which safetensors files hold a network's weights, and each weight's place. Imports no JAX.

The names are those that diffusers and transformers write: one file, or shards with an index, and of
either a variant such as "fp16".
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxdiff.checkpoint.component import INDEX, TOKENIZER_FILES, Component, config_file
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.safetensors_header import ITEM_BYTES, read_header
from jaxdiff.checkpoint.tensors import FLOATS, SHOWN, StoredTensor
from jaxdiff.errors import InputError

OTHER_VARIANTS = ("fp16", "bf16")  # taken in this order where there is no full file
UNREADABLE = (".bin", ".bin.index.json", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")


class NoVariantError(InputError):
    """A checkpoint has no weights of the variant that was asked for."""


def choose(
    folders: dict[str, Collection[str]],
    variant: str | None,
    where: str | Path,
    components: Mapping[str, Component],
) -> dict[str, str]:
    """Picks each network's weights: the name of its one file, or of its shards' index.

    Args:
      folders: for each network, the names of the files in its folder.
      components: the networks, by their folders.
      variant: such as "fp16", taken wherever it is; None takes the full weights, and only where
        there are none the float16 or the bfloat16 ones.
      where: the folders' parent, for the messages.

    Raises:
      InputError: if a network has no weights to read.
      NoVariantError: if none has the variant.
    """
    stems = {network: components[network].stem for network in folders}
    if variant and not any(
        name in folders[network]
        for network, stem in stems.items()
        for name in (_single(stem, variant), _index(stem, variant))
    ):
        raise NoVariantError(f"{where} has no weights of the variant {variant!r}; ask for none")
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
    """Of the files of a checkpoint that is elsewhere, by relative name, those that are needed."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, plain = name.rpartition("/")
        folders.setdefault(folder, []).append(plain)
    known = [INDEX, *(f"{name}/{config_file(name)}" for name in (*components, "scheduler"))]
    known += [f"{folder}/{name}" for folder in tokenizers(components) for name in TOKENIZER_FILES]
    wanted = [name for name in known if name in names]
    networks = {network: folders[network] for network in components if network in folders}
    for network, main in choose(networks, variant, where, components).items():
        wanted += [f"{network}/{main}"]
        if main.endswith(".json"):
            wanted += [f"{network}/{name}" for name in networks[network] if _is_shard(name, main)]
    return wanted


def tokenizers(components: Mapping[str, Component]) -> list[str]:
    """The folders of the components' tokenizers."""
    return [each.tokenizer for each in components.values() if each.tokenizer]


def no_index(where: str, kind: str, names: Collection[str]) -> str:
    """Why a "directory" or a "repository" with these files cannot be opened without `INDEX`."""
    said = f"{where} holds no {INDEX}: it is no diffusers {kind}"
    if "config.json" in names:
        return f"{said} but one network alone; name a whole model"
    single = sorted(name for name in names if name.endswith(".safetensors"))
    if single:
        return (
            f"{said}; of single files it holds {', '.join(single[:SHOWN])}: download and name one"
        )
    return f"{said}; name another"


def read_weights(component: Component, path: Path) -> dict[str, StoredTensor]:
    """Finds the weights of a network by their plain keys, from its one file or its index.

    Raises:
      InputError: for files that are missing, cut short, at odds with their index or not floats.
    """
    stored = read_header(path) if path.suffix == ".safetensors" else _read_shards(path)
    weights = {}
    for key, tensor in stored.items():
        plain = component.plain_key(key.removeprefix(component.prefix))
        if plain is None:
            continue
        if plain in weights:
            raise InputError(f"{tensor.file}: {key} is there twice")
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{tensor.file}: {key} is stored as {tensor.dtype}; only {', '.join(FLOATS)} "
                "are read"
            )
        weights[plain] = tensor
    if not weights:
        raise InputError(f"{path} holds no weights; copy the checkpoint again")
    return weights


def _read_shards(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path} has no weight_map; copy it again")
    for name in places.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(
                f"{path} names {name!r}, which is no safetensors file of its folder; "
                "do not use this checkpoint"
            )
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(places.values())):
        for key, tensor in read_header(path.with_name(name)).items():
            if key in stored:
                raise InputError(f"{tensor.file}: {key} is in {stored[key].file.name} too")
            stored[key] = tensor
    for key in [*places, *stored]:
        if key not in stored or stored[key].file.name != places.get(key):
            says = f"in {places[key]}" if key in places else "nowhere"
            found = f"in {stored[key].file.name}" if key in stored else "not there"
            raise InputError(f"{path}: {key} should be {says} and is {found}; copy it again")
    metadata = index.get("metadata")
    promised = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.size * ITEM_BYTES[tensor.dtype] for tensor in stored.values())
    if promised is not None and promised != total:
        raise InputError(
            f"{path} promises {promised} bytes of weights where there are {total}; copy it again"
        )
    return stored


def _single(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def _is_shard(name: str, index: str) -> bool:
    """Whether a file's name is one of those that this index may list."""
    stem, variant = re.fullmatch(r"(.+)\.safetensors\.index(\..+)?\.json", index).groups("")
    part = r"-\d+-of-\d+"
    orders = variant + part, part + variant  # the first is today's
    return any(re.fullmatch(rf"{re.escape(stem)}{o}\.safetensors", name) for o in orders)


def _no_weights(folder: str, stem: str, names: Collection[str]) -> str:
    variants = {
        found[1]
        for name in names
        if (found := re.fullmatch(rf"{stem}\.(\w+)(-\d+-of-\d+)?\.safetensors", name))
    }
    if variants:
        return f"{folder} has only the variants {', '.join(sorted(variants))}; ask for one of them"
    others = sorted(name for name in names if name.endswith(UNREADABLE))
    if others:
        return (
            f"{folder} holds {others[0]} and no safetensors file, and nothing else is safe to "
            "read; convert the checkpoint with PyTorch diffusers: "
            "pipeline.save_pretrained(DIRECTORY, safe_serialization=True)"
        )
    return f"{folder}/{stem}.safetensors is missing; copy the checkpoint again"
