"""Finds and reads CLIP checkpoints in the formats of transformers and OpenCLIP."""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from jaxdiff.checkpoint import sources
from jaxdiff.checkpoint.component import TOKENIZER_FILES, Component
from jaxdiff.checkpoint.fingerprint import fingerprint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.original.ldm import openclip_names
from jaxdiff.checkpoint.original.naming import Names
from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.checkpoint.tensors import FLOATS, StoredTensor, describe_misfits
from jaxdiff.checkpoint.tokenizer_files import check_tokenizer
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.errors import InputError
from jaxdiff.families.components import BUFFER
from jaxdiff.images.clip_pixels import MEAN, STD
from jaxdiff.models import config as config_json
from jaxdiff.models.text.clip import OLD_EOS, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
WEIGHTS, OPEN_CLIP_WEIGHTS = "model.safetensors", "open_clip_model.safetensors"
CLIP = Component(library="transformers", class_name="CLIPModel")
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Either file defines the preprocessing of pixels; transformers 5 writes the second.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
PROBE = "tokenizer_config.json"  # in every repository of either kind

BICUBIC = 3  # Pillow's number
LARGEST = 2**20  # limit on a config's numbers, which are used before any weight is checked
# The keys of OpenCLIP's configs with their defaults, and the corresponding fields of our configs.
OPEN_CLIP_MODEL = {"embed_dim": 512, "quick_gelu": False, "text_cfg": None, "vision_cfg": None}
OPEN_CLIP_TEXT = {
    **{"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "mlp_ratio": 4.0,
}
OPEN_CLIP_VISION = {
    **{"image_size": 224, "patch_size": 16, "width": 768, "head_width": 64, "layers": 12},
    "mlp_ratio": 4.0,
}
FIELDS = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "image_size": "image_size",
    "patch_size": "patch_size",
}


@dataclass(frozen=True)
class PixelRule:
    """The preprocessing of an image: resize and center-crop to `size`, then normalize.

    Attributes:
      size: the side of the square, in pixels.
      mean, std: of each channel in 0..1; subtracts the mean, then divides by the deviation.
    """

    size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


@dataclass(frozen=True)
class StoredClip:
    """A complete CLIP checkpoint on this machine, as returned by `find`.

    Attributes:
      name: a Hub id, or the name of the directory.
      config: of the networks.
      pixels: the preprocessing of an image.
      tensors: the weights, by transformers' keys.
      tokenizer: the folder of the tokenizer's files.
      files: every file that determines an embedding, by name.
    """

    name: str
    config: CLIPConfig
    pixels: PixelRule
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path
    files: dict[str, Path]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every file that determines an embedding."""
        return fingerprint(self.files)


def find(model: str | Path) -> StoredClip:
    """Finds a CLIP checkpoint, downloads it if necessary, and checks that it is complete.

    Args:
      model: a directory written by transformers' `CLIPModel` and `CLIPProcessor` (`config.json`,
        `preprocessor_config.json`, `model.safetensors`, the tokenizer) or by OpenCLIP
        (`open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer); or the Hub id of
        a repository with these files, "owner/name" or "owner/name@revision".

    Raises:
      InputError: for another network, or a file that is missing or invalid.
    """
    directory = Path(model)
    if not directory.exists() and sources.HUB_ID.fullmatch(str(model)):
        directory, name = sources.from_hub(str(model), wanted_files, PROBE), str(model)
    else:
        name = directory.resolve().name
    if not directory.is_dir():
        raise InputError(
            f"CLIP {str(model)!r} is not a directory; name one that transformers or OpenCLIP "
            "wrote, or a Hub id like openai/clip-vit-large-patch14"
        )
    names = {path.name for path in directory.iterdir()}
    if _is_transformers(names):
        config, pixels, tensors, decisive = _read_transformers(directory, names)
    elif {OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS} <= names:
        config, pixels, tensors = _read_open_clip(directory)
        decisive = [OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS]
    else:
        raise InputError(
            f"{directory} has neither {CONFIG} with {WEIGHTS} nor {OPEN_CLIP_CONFIG} with "
            f"{OPEN_CLIP_WEIGHTS}; convert the checkpoint with transformers: "
            "CLIPModel.from_pretrained(...).save_pretrained(DIRECTORY)"
        )
    check_tokenizer(directory)
    decisive += [file for file in TOKENIZER_FILES if file in names]
    files = {file: directory / file for file in decisive}
    return StoredClip(name, config, pixels, tensors, directory, files)


def _is_transformers(names: Collection[str]) -> bool:
    return CONFIG in names and (WEIGHTS in names or INDEX in names)


def wanted_files(names: Collection[str]) -> list[str]:
    """Returns the names of a repository's files that are needed."""
    if _is_transformers(names):
        weights = [WEIGHTS] if WEIGHTS in names else [INDEX, *filter(SHARD.fullmatch, names)]
        wanted = [CONFIG, *PROCESSORS, *weights]
    else:
        wanted = [OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS]
    return [name for name in (*wanted, *TOKENIZER_FILES) if name in names]


def _read_transformers(
    directory: Path, names: Collection[str]
) -> tuple[CLIPConfig, PixelRule, Mapping[str, StoredTensor], list[str]]:
    path = directory / CONFIG
    said = read_json(path)
    if said.get("model_type") != "clip":
        raise InputError(
            f"{path}: model_type = {said.get('model_type')!r} is not CLIP; name a directory "
            "written by transformers' CLIPModel"
        )
    width = said.get("projection_dim", 512)
    text = _part(path, "text_config", CLIPTextConfig, said, {"projection_dim": width})
    vision = _part(path, "vision_config", CLIPVisionConfig, said, {})
    if WEIGHTS in names:
        stored, weights = read_header(directory / WEIGHTS), [WEIGHTS]
    else:
        stored = read_weights(CLIP, directory / INDEX)
        weights = [INDEX, *sorted({tensor.file.name for tensor in stored.values()})]
    tensors = {key: tensor for key, tensor in stored.items() if not key.endswith(BUFFER)}
    config = CLIPConfig(text, vision, width)
    _check_sizes(path, config, tensors)
    processor = next((name for name in PROCESSORS if name in names), PROCESSORS[0])
    return config, _pixels(directory / processor, config), tensors, [CONFIG, processor, *weights]


def _part(path: Path, part: str, kind, said: dict, besides: dict):
    """Reads the config of one encoder.

    Ignores keys that are not fields of the encoder, as transformers does: old files also list every
    text-generation setting.
    """
    given = {}
    for name in (part, f"{part}_dict"):  # old files have both; the second overrides the first
        value = said.get(name) or {}
        if not isinstance(value, dict):
            raise InputError(f"{path}: {name} is not a JSON object; copy the file again")
        given |= value
    known = {field.name for field in fields(kind)} - {"architectures"}
    return _built(f"{path}: {part}", kind, {k: v for k, v in given.items() if k in known} | besides)


def _built(where: str, kind, values: dict):
    try:
        return config_json.from_json(kind, where, values, {})
    except InputError as error:
        raise InputError(str(error).replace(f"{where}/{CONFIG}", where)) from error


def _pixels(path: Path, config: CLIPConfig) -> PixelRule:
    said, size = read_json(path), config.vision.image_size
    said = said.get("image_processor", said)
    always = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    _check_values(
        path,
        said,
        {
            "size": (size, {"shortest_edge": size}),
            "crop_size": (size, {"height": size, "width": size}),
            "resample": (BICUBIC,),
            "rescale_factor": (1 / 255,),
            **dict.fromkeys(always, (True,)),
        },
    )
    return _rule(path, size, said.get("image_mean"), said.get("image_std"))


def _check_values(path: Path, said: dict, built: dict[str, tuple]) -> None:
    """Rejects a key with an unsupported value; `built` lists the supported ones."""
    if not isinstance(said, dict):
        raise InputError(f"{path} does not define the preprocessing; copy the file again")
    for key, values in built.items():
        if said.get(key) is not None and said[key] not in values:
            raise InputError(
                f"{path}: {key} = {said[key]!r} is not supported (only {values[-1]!r} is)"
            )


def _rule(path: Path, size: int, mean, std) -> PixelRule:
    """Builds the preprocessing rule, with OpenAI's mean and deviation as defaults."""
    for said in (mean, std):
        if said is not None and not (
            isinstance(said, list)
            and len(said) == 3
            and all(type(each) in (int, float) and abs(each) < LARGEST for each in said)
        ):
            raise InputError(
                f"{path}: {said!r} is not a mean or deviation of three channels; copy the file "
                "again"
            )
    if std is not None and min(std) <= 0:
        raise InputError(f"{path}: a deviation must be above 0, not {min(std)}")
    return PixelRule(size, tuple(mean or MEAN), tuple(std or STD))


def _read_open_clip(directory: Path) -> tuple[CLIPConfig, PixelRule, Mapping[str, StoredTensor]]:
    path = directory / OPEN_CLIP_CONFIG
    said = read_json(path)
    model = _values(path, "model_cfg", said.get("model_cfg"), OPEN_CLIP_MODEL)
    text = _values(path, "text_cfg", model["text_cfg"], OPEN_CLIP_TEXT)
    vision = _values(path, "vision_cfg", model["vision_cfg"], OPEN_CLIP_VISION)
    activation = {"hidden_act": "quick_gelu" if model["quick_gelu"] else "gelu"}
    heads = max(1, vision["width"] // vision["head_width"])
    renamed = {
        kind: {FIELDS[key]: value for key, value in values.items() if key in FIELDS}
        | {"intermediate_size": int(values["width"] * values["mlp_ratio"])}
        | activation
        for kind, values in ((CLIPTextConfig, text), (CLIPVisionConfig, vision))
    }
    renamed[CLIPTextConfig] |= {"eos_token_id": OLD_EOS, "projection_dim": model["embed_dim"]}
    renamed[CLIPVisionConfig] |= {"num_attention_heads": heads}
    config = CLIPConfig(
        *(_built(str(path), kind, values) for kind, values in renamed.items()), model["embed_dim"]
    )
    pixels, size = said.get("preprocess_cfg") or {}, config.vision.image_size
    built = {
        "size": (size, [size, size]),
        "mode": ("RGB",),
        "interpolation": ("bicubic",),
        "resize_mode": ("shortest",),
    }
    _check_values(path, pixels, built)
    rule = _rule(path, size, pixels.get("mean"), pixels.get("std"))
    return config, rule, _renamed(directory / OPEN_CLIP_WEIGHTS, config)


def _values(path: Path, part: str, given, usual: dict) -> dict:
    """Reads a part of OpenCLIP's config with the defaults `usual`; rejects other keys."""
    if not isinstance(given, dict):
        raise InputError(f"{path} has no {part}; copy the file again")
    for key, value in given.items():
        if key not in usual and value not in (None, False):
            raise InputError(f"{path}: {part} with {key} = {value!r} is not supported")
        number = type(usual.get(key)) in (int, float)
        if number and (type(value) not in (int, float) or not 0 < value < LARGEST):
            raise InputError(f"{path}: {part} with {key} = {value!r} is not supported")
    return usual | {key: value for key, value in given.items() if key in usual}


def _renamed(path: Path, config: CLIPConfig) -> dict[str, StoredTensor]:
    """Returns OpenCLIP's weights by transformers' keys."""
    stored = read_header(path)
    _check_sizes(path, config, stored)
    for key, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{path}: {key} is stored as {tensor.dtype}; supported: {', '.join(FLOATS)}"
            )
    tensors, missing, used = {}, [], set()
    for ours, theirs, cut in _open_clip_names(config):
        used.add(theirs)
        if theirs not in stored:
            missing.append(theirs)
            continue
        try:
            tensors[ours] = cut(stored[theirs]) if cut else stored[theirs]
        except (IndexError, ValueError) as error:
            shape = list(stored[theirs].shape)
            raise InputError(
                f"{path}: {theirs} has the wrong shape {shape}; copy the file again"
            ) from error
    misfits = describe_misfits({"missing": set(missing), "unknown": stored.keys() - used})
    if misfits:
        raise InputError(f"{path} does not match its config; weights: {misfits}")
    return tensors


def _open_clip_names(config: CLIPConfig) -> Names:
    """Yields (our name, OpenCLIP's name, conversion) for every weight.

    Both encoders are named like Stable Diffusion XL's text encoder, except for the image inputs.
    """
    for ours, theirs, cut in openclip_names({"num_hidden_layers": config.text.num_hidden_layers}):
        yield ours if ours.startswith("text_projection") else f"text_model.{ours}", theirs, cut
    for ours, theirs, cut in openclip_names({"num_hidden_layers": config.vision.num_hidden_layers}):
        if ours.startswith("encoder."):
            yield f"vision_model.{ours}", f"visual.{theirs}", cut
    for ours, theirs in {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }.items():
        yield f"vision_model.{ours}", f"visual.{theirs}", None
    yield "visual_projection.weight", "visual.proj", StoredTensor.transpose
    yield "logit_scale", "logit_scale", None


def _check_sizes(path: Path, config: CLIPConfig, stored: Collection[str]) -> None:
    """Rejects a config with more layers than there are weights, or with absurd sizes."""
    for part in (config.text, config.vision):
        sizes = {key: value for key, value in asdict(part).items() if type(value) is int}
        for key, value in {**sizes, "projection_dim": config.projection_dim}.items():
            most = len(stored) if key == "num_hidden_layers" else LARGEST
            if value > most:
                raise InputError(
                    f"{path}: {key} = {value} is too large for its {len(stored)} weights"
                )
