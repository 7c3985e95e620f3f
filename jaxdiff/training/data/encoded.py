"""Images as latents and captions as embeddings, made once by `pipelines.encode`.

    DIR/encoding.json              what is being encoded, and how; written first
    DIR/data/00000.safetensors     images of one size: mean, std, captions, perhaps embeddings
    DIR/empty.safetensors          the empty caption's embeddings, if captions are embedded
    DIR/encoded.json               what made it, and the shards; written last

The posterior of the autoencoder is stored, not a sample: so every epoch draws new latents from it,
as if images were encoded when they are needed. It is stored as the denoiser knows latents, brought
to unit variance. Imports no JAX.
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
EMBEDDINGS = ("context", "pooled")
ENCODER = ("encoder", "quant_conv")  # the parts of an autoencoder that make latents
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
DTYPES = {"F16": np.dtype("<f2"), "U8": np.dtype("u1"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class Shard:
    """A file of encoded images of one size.

    Attributes:
      file: its name within the folder.
      height, width: of the images, in pixels.
      images: how many.
    """

    file: str
    height: int
    width: int
    images: int


@dataclass(frozen=True, eq=False)
class EncodedExamples:
    """Encoded images; any of them may be read at any time, on any thread.

    Attributes:
      path: the folder that they come from.
      captions: what was said of each.
      sizes: int32 [n, 2], height and width in pixels of the images that were encoded.
      made_with: digests of what encoded them: "autoencoder", as `latents_digest` gives it, and, if
        captions are embedded, "text_encoders": the `weights_digest` of {name: parameters}.
      empty: the embedding of the empty caption, float32: "context" [tokens, width] and perhaps
        "pooled" [width]; nothing if captions are not embedded.
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
        """What was said of an image."""
        return self.captions[index]

    def posterior(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of an image's latents, scaled, float32 [h, w, channels]."""
        shard, row = self._find(index)
        return shard["mean"][row].astype(np.float32), shard["std"][row].astype(np.float32)

    def embedding(self, index: int) -> dict[str, np.ndarray]:
        """Of a caption, with the keys and shapes of `empty`."""
        shard, row = self._find(index)
        return {name: shard[name][row].astype(np.float32) for name in self.empty}

    def _find(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._shards[number], index - int(self._starts[number])


def is_encoded(folder: Path) -> bool:
    """Whether `pipelines.encode` has finished, or begun, to write there."""
    return (folder / INDEX).is_file() or (folder / SETTINGS).is_file()


def open_encoded(folder: Path) -> EncodedExamples:
    """Opens what `pipelines.encode` has finished; maps its shards into memory.

    Raises:
      InputError: naming the file, if it is not finished or not as it was written.
    """
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder} is not encoded to the end; the same command continues")
    try:
        said = json.loads(index.read_text("utf-8"))
        if said["version"] != VERSION:
            raise ValueError("another version of jaxdiff made it")
        shards = [Shard(**shard) for shard in said["shards"]]
        made_with = {str(name): str(value) for name, value in said["made_with"].items()}
        if not shards:
            raise ValueError("it names no shards")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as problem:
        raise InputError(f"{index} cannot be used ({problem}); encode again elsewhere") from None
    has_embeddings = "text_encoders" in made_with
    empty = _mapped(folder / EMPTY) if has_embeddings else {}
    if has_embeddings != bool(empty) or not set(empty) <= set(EMBEDDINGS):
        raise InputError(f"{folder / EMPTY} does not hold embeddings; encode again elsewhere")
    empty = {name: array.astype(np.float32) for name, array in empty.items()}
    maps = [_shard(folder, shard, empty) for shard in shards]
    counts = [shard.images for shard in shards]
    starts = np.cumsum([0, *counts[:-1]])
    sizes = np.array([(shard.height, shard.width) for shard in shards], np.int32)
    sizes = np.repeat(sizes, counts, axis=0)
    captions = [caption for arrays in maps for caption in _captions(arrays)]
    return EncodedExamples(folder, captions, sizes, made_with, empty, maps, starts)


def _shard(folder: Path, shard: Shard, empty: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not re.fullmatch(r"data/[\w-]+\.safetensors", str(shard.file)):
        raise InputError(f"{folder / INDEX} names {shard.file!r}, which is none of its shards")
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
        raise InputError(f"{path} does not hold what {INDEX} says; encode again elsewhere")
    return arrays


def _captions(arrays: dict[str, np.ndarray]) -> list[str]:
    content, ends = arrays["captions"].tobytes(), arrays["caption_ends"].tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [content[start:end].decode("utf-8", "replace") for start, end in spans]


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, on the disk; none that are empty or of other types."""
    return {
        name: np.memmap(path, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
        for name, tensor in read_header(path).items()
        if tensor.dtype in DTYPES and tensor.size
    }


def shard_bytes(
    mean: np.ndarray, std: np.ndarray, captions: Sequence[str], embeddings: dict[str, np.ndarray]
) -> bytes:
    """A shard's file.

    Args:
      mean, std: of the scaled latents, [n, h, w, channels].
      captions: of the images; none is empty.
      embeddings: of the captions, [n, ...], by the names of `EMBEDDINGS`.
    """
    texts = [caption.encode() for caption in captions]
    tensors = _halves({"mean": mean, "std": std, **embeddings})
    tensors["captions"] = np.frombuffer(b"".join(texts), np.uint8)
    tensors["caption_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return save(tensors)


def empty_bytes(embeddings: dict[str, np.ndarray]) -> bytes:
    """The file of the empty caption's embeddings, [...] each."""
    return save(_halves(embeddings))


def _halves(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, "<f2") for name, array in arrays.items()}


def index_text(shards: Sequence[Shard], made_with: dict[str, str]) -> str:
    """What `encoded.json` says; `made_with` as in `EncodedExamples`."""
    listed = [asdict(shard) for shard in shards]
    return json.dumps({"version": VERSION, "made_with": made_with, "shards": listed}, indent=1)


def check_encoders(examples: EncodedExamples, config, params: dict) -> None:
    """Refuses to train a model on what other networks have encoded.

    Args:
      config: the `AutoencoderKLConfig` of the model.
      params: its parameters, by "vae", "text_encoder" and so on, of nested dicts.

    Raises:
      InputError: if its autoencoder or its text encoders are not those that made the examples.
    """
    found = {"autoencoder": latents_digest(config, params["vae"])}
    if "text_encoders" in examples.made_with:
        encoders = {name: value for name, value in params.items() if name in TEXT_ENCODERS}
        found["text_encoders"] = weights_digest(encoders)
    for name, digest in found.items():
        if digest != examples.made_with.get(name):
            raise InputError(
                f"{examples.path} was not encoded by the {name.replace('_', ' ')} of this model; "
                "encode the images again with it"
            )


def latents_digest(config, params: dict) -> str:
    """SHA-256 (hex) of all that latents depend on; an autoencoder's decoder is not part of it.

    Args:
      config: its `AutoencoderKLConfig`.
      params: its parameters, a nested dict.
    """
    scale = {name: getattr(config, name) for name in SCALE}
    parts = {name: params[name] for name in ENCODER if name in params}
    return weights_digest(parts, repr(scale))


def weights_digest(params: dict, said: str = "") -> str:
    """SHA-256 (hex) of parameters as float32, with their names, and of a text."""
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
