"""The format of encoded datasets: images as latents, captions as embeddings.

`pipelines.encode` writes it:

    DIR/encoding.json              the input and the settings; written first
    DIR/data/00000.safetensors     images of one size: mean, std, captions, optionally embeddings
    DIR/empty.safetensors          the empty caption's embeddings, if captions are embedded
    DIR/encoded.json               digests of the encoders and the shards; written last

The autoencoder's posterior is stored instead of a sample, so that every epoch draws new latents, as
if images were encoded on the fly. It is scaled to unit variance, as the denoiser expects. This
module does not import JAX.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.errors import InputError

INDEX = "encoded.json"
SETTINGS = "encoding.json"
EMPTY = "empty.safetensors"
VERSION = 1
EMBEDDINGS = ("context", "pooled", "mask")
DECODER = ("decoder", "post_quant_conv")  # the parts of an autoencoder that latents do not need
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
DTYPES = {"F16": np.dtype("<f2"), "U8": np.dtype("u1"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class Shard:
    """A file with encoded images of one size.

    Attributes:
      file: its path relative to the folder.
      height, width: the size of the images in pixels.
      images: the number of images.
    """

    file: str
    height: int
    width: int
    images: int


@dataclass(frozen=True, eq=False)
class EncodedExamples:
    """Encoded images with random access; thread-safe.

    Attributes:
      path: the folder of the dataset.
      captions: one per image.
      sizes: int32 [n, 2], height and width in pixels of the images as encoded.
      made_with: digests of the encoders: "autoencoder", from `latents_digest`, and, if captions are
        embedded, "text_encoders": the `weights_digest` of {name: parameters}.
      empty: the embedding of the empty caption, float32: "context" [tokens, width] and, for some
        models, "pooled" [width] and "mask", bool [tokens]; {} if captions are not embedded.
    """

    path: Path
    captions: list[str]
    sizes: np.ndarray
    made_with: dict[str, str]
    empty: dict[str, np.ndarray]
    _shards: list[dict[str, np.ndarray]]
    _starts: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def caption(self, index: int) -> str:
        """Returns the caption of an image."""
        return self.captions[index]

    def posterior(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and std of an image's scaled latents, each float32 [h, w, channels]."""
        shard, row = self._find(index)
        return shard["mean"][row].astype(np.float32), shard["std"][row].astype(np.float32)

    def embedding(self, index: int) -> dict[str, np.ndarray]:
        """Returns the embedding of a caption, with the keys and shapes of `empty`."""
        shard, row = self._find(index)
        return {name: shard[name][row].astype(like.dtype) for name, like in self.empty.items()}

    def _find(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._shards[number], index - int(self._starts[number])


def is_encoded(folder: Path) -> bool:
    """Returns whether `pipelines.encode` has started or finished writing to the folder."""
    return (folder / INDEX).is_file() or (folder / SETTINGS).is_file()


def open_encoded(folder: Path) -> EncodedExamples:
    """Opens a dataset from `pipelines.encode` and memory-maps its shards.

    Raises:
      InputError: naming the file, if the dataset is unfinished or damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder} is not fully encoded; run the same encode command again")
    try:
        said = json.loads(index.read_text("utf-8"))
        if said["version"] != VERSION:
            raise ValueError("it was made by another version of jaxdiff")
        shards = [Shard(**shard) for shard in said["shards"]]
        made_with = {str(name): str(value) for name, value in said["made_with"].items()}
        if not shards:
            raise ValueError("it lists no shards")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as problem:
        raise InputError(f"{index} is invalid ({problem}); encode into another folder") from None
    has_embeddings = "text_encoders" in made_with
    empty = _mapped(folder / EMPTY) if has_embeddings else {}
    if has_embeddings != bool(empty) or not set(empty) <= set(EMBEDDINGS):
        raise InputError(f"{folder / EMPTY} contains no embeddings; encode into another folder")
    empty = {
        name: array.astype(bool if name == "mask" else np.float32) for name, array in empty.items()
    }
    maps = [_shard(folder, shard, empty) for shard in shards]
    counts = [shard.images for shard in shards]
    starts = np.cumsum([0, *counts[:-1]])
    sizes = np.array([(shard.height, shard.width) for shard in shards], np.int32)
    sizes = np.repeat(sizes, counts, axis=0)
    captions = [caption for arrays in maps for caption in _captions(arrays)]
    return EncodedExamples(folder, captions, sizes, made_with, empty, maps, starts)


def _shard(folder: Path, shard: Shard, empty: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not re.fullmatch(r"data/[\w-]+\.safetensors", str(shard.file)):
        raise InputError(
            f"{folder / INDEX} lists {shard.file!r}, which is not a valid shard name; encode into "
            "another folder"
        )
    path = folder / shard.file
    arrays = _mapped(path)
    shapes = {name: array.shape for name, array in arrays.items()}
    ends = arrays.get("caption_ends", np.zeros(0))
    sound = (
        all(type(side) is int and 0 < side < 2**16 for side in (shard.height, shard.width))
        and len(shapes.get("mean", ())) == 4
        and shapes.get("std") == shapes["mean"]
        and shapes["mean"][0] == shard.images == len(ends)
        and np.all(np.diff(ends, prepend=0) > 0)
        and shapes.get("captions") == (ends[-1],)
        and all(shapes.get(name) == (shard.images, *empty[name].shape) for name in empty)
    )
    if not sound:
        raise InputError(f"{path} does not match {INDEX}; encode into another folder")
    return arrays


def _captions(arrays: dict[str, np.ndarray]) -> list[str]:
    content, ends = arrays["captions"].tobytes(), arrays["caption_ends"].tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [content[start:end].decode("utf-8", "replace") for start, end in spans]


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Memory-maps the arrays of a safetensors file, except empty arrays and other dtypes."""
    return {
        name: np.memmap(path, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
        for name, tensor in read_header(path).items()
        if tensor.dtype in DTYPES and tensor.size
    }


def shard_bytes(
    mean: np.ndarray, std: np.ndarray, captions: Sequence[str], embeddings: dict[str, np.ndarray]
) -> bytes:
    """Serializes a shard.

    Args:
      mean, std: mean and standard deviation of the scaled latents, [n, h, w, channels].
      captions: one per image; must not be empty.
      embeddings: of the captions, [n, ...], with the keys of `EMBEDDINGS`.
    """
    texts = [caption.encode() for caption in captions]
    tensors = _stored({"mean": mean, "std": std, **embeddings})
    tensors["captions"] = np.frombuffer(b"".join(texts), np.uint8)
    tensors["caption_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return save(tensors)


def empty_bytes(embeddings: dict[str, np.ndarray]) -> bytes:
    """Serializes the embeddings of the empty caption, [...] each."""
    return save(_stored(embeddings))


def _stored(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts masks to bytes and everything else to float16."""
    return {
        name: np.ascontiguousarray(array, "u1" if array.dtype == bool else "<f2")
        for name, array in arrays.items()
    }


def index_text(shards: Sequence[Shard], made_with: dict[str, str]) -> str:
    """Returns the text of `encoded.json`; `made_with` as in `EncodedExamples`."""
    listed = [asdict(shard) for shard in shards]
    return json.dumps({"version": VERSION, "made_with": made_with, "shards": listed}, indent=1)


def check_encoders(examples: EncodedExamples, config, params: dict) -> None:
    """Checks that the examples were encoded by this model's own networks.

    Args:
      config: the config dataclass of the model's autoencoder.
      params: the model's parameters, nested dicts with the keys "vae", "text_encoder" and so on.

    Raises:
      InputError: if the autoencoder or the text encoders differ.
    """
    found = {"autoencoder": latents_digest(config, params["vae"])}
    if "text_encoders" in examples.made_with:
        encoders = {name: value for name, value in params.items() if name in TEXT_ENCODERS}
        found["text_encoders"] = weights_digest(encoders)
    for name, digest in found.items():
        if digest != examples.made_with.get(name):
            raise InputError(
                f"{examples.path} was not encoded by the {name.replace('_', ' ')} of this model; "
                "encode the images again with this model"
            )


def latents_digest(config, params: dict) -> str:
    """Computes a SHA-256 digest (hex) of everything latents depend on, so not of the decoder.

    Args:
      config: the autoencoder's config dataclass.
      params: the autoencoder's parameters, a nested dict.
    """
    scale = {name: getattr(config, name) for name in SCALE if hasattr(config, name)}
    parts = {name: values for name, values in params.items() if name not in DECODER}
    return weights_digest(parts, repr(scale))


def weights_digest(params: dict, said: str = "") -> str:
    """Computes a SHA-256 digest (hex) of a text and of named parameters as float32."""
    digest = hashlib.sha256(said.encode())

    def add(name: str, value) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        else:
            digest.update(f"{name}{value.shape}".encode())
            digest.update(np.asarray(value, np.float32).tobytes())

    add("", params)
    return digest.hexdigest()
