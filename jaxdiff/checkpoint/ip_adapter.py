"""Opens IP-Adapters (Ye et al., 2023, arXiv:2308.06721): a file, and its image encoder's folder.

The published layout is two folders, `models/` for Stable Diffusion 1 and `sdxl_models/` for XL,
each with its adapters and an `image_encoder/`. Some adapters need the other folder's encoder. Which
one it is can be told from the sizes of the weights. Imports no JAX.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jaxdiff.checkpoint.component import CONFIG, Component
from jaxdiff.checkpoint.fingerprint import fingerprint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.checkpoint.weight_files import UNREADABLE, choose, read_weights
from jaxdiff.errors import InputError

ADAPTER = Component(library="diffusers", class_name="IPAdapter")
IMAGE_ENCODER = Component(
    library="transformers",
    class_name="CLIPVisionModelWithProjection",
    plain_key=lambda key: None if key.endswith(".position_ids") else key,  # old files' buffer
)
ENCODER, PUBLISHED = "image_encoder", ("models", "sdxl_models")
FACE_ID = "image_proj.norm.weight"  # also in plain adapters
FIRST_KEY = "ip_adapter.1.to_k_ip.weight"  # [attention width, context width]
OUTPUT = "visual_projection.weight"  # of an image encoder: [projection dim, hidden size]


class Kind(NamedTuple):
    """How a kind of adapter is recognised.

    Attributes:
      own: the key of a weight that only this kind has.
      first: that of the weight that is applied to what the adapter reads.
      axis: of `OUTPUT`, whose size is that of what the adapter reads.
    """

    own: str
    first: str
    axis: int


KINDS = {
    "plain": Kind("image_proj.proj.weight", "image_proj.proj.weight", 0),
    "plus": Kind("image_proj.latents", "image_proj.proj_in.weight", 1),
    "full-face": Kind("image_proj.proj.3.weight", "image_proj.proj.0.weight", 1),
}


@dataclass(frozen=True)
class IPAdapterFiles:
    """A complete IP-Adapter on this machine; `open_ip_adapter` makes it.

    Attributes:
      path: its file.
      kind: "plain", "plus" or "full-face".
      tensors: the location of each of its weights by its key, `image_proj.*` or `ip_adapter.K.*`.
      encoder: the image encoder's folder.
      encoder_config: the parsed `config.json` of the image encoder.
      encoder_tensors: the location of each of the image encoder's weights by its key.
      files: every file that affects the pixels, by a name that does not depend on its place.
    """

    path: Path
    kind: str
    tensors: dict[str, StoredTensor]
    encoder: Path
    encoder_config: dict
    encoder_tensors: dict[str, StoredTensor]
    files: dict[str, Path]

    @property
    def context_width(self) -> int:
        """The width of the tokens that it makes of an image."""
        return self.tensors[FIRST_KEY].shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every file that affects the pixels, independent of the path."""
        return fingerprint(self.files)


def open_ip_adapter(said: str) -> IPAdapterFiles:
    """Opens an IP-Adapter and checks that its files are complete; reads no weights.

    Args:
      said: the path of a safetensors file as published, for example
        `models/ip-adapter_sd15.safetensors`. Its image encoder is the first that fits it of
        `image_encoder/` beside it and above it, and in `models/` and `sdxl_models/` above it.

    Raises:
      InputError: if the file is missing or damaged, or no safetensors file; if it holds a FaceID
        adapter or something else; or if no image encoder is there, or none fits.
    """
    try:
        return _open(said, Path(said))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"IP-Adapter {said!r} cannot be read ({reason})") from error


def _open(said: str, path: Path) -> IPAdapterFiles:
    if path.suffix != ".safetensors" or not path.is_file():
        raise InputError(f"IP-Adapter {said!r} {_no_file(path)}")
    tensors = read_weights(ADAPTER, path)
    kind = _kind(path, tensors)
    first = KINDS[kind].first
    for key in (first, FIRST_KEY):
        if key not in tensors or len(tensors[key].shape) != 2:
            raise InputError(f"{path} has no {key} of two axes; copy it again")
    encoder, encoder_tensors = _encoder(path, KINDS[kind], tensors[first])
    weights = {tensor.file.name: tensor.file for tensor in encoder_tensors.values()}
    config = encoder / CONFIG
    return IPAdapterFiles(
        path=path,
        kind=kind,
        tensors=tensors,
        encoder=encoder,
        encoder_config=read_json(config),
        encoder_tensors=encoder_tensors,
        files={
            "ip_adapter.safetensors": path,
            f"{ENCODER}/{CONFIG}": config,
            **{f"{ENCODER}/{name}": file for name, file in weights.items()},
        },
    )


def _no_file(path: Path) -> str:
    """Says what is there instead of an adapter's file, and what to do."""
    if path.is_dir():
        return "is a folder; name the adapter's .safetensors file in it"
    if not path.is_file():
        return "is not a file on this machine; download it, or correct the path"
    if path.name.endswith(UNREADABLE):
        return (
            "is not a safetensors file, and other formats are not safe to read; use the "
            ".safetensors file that is published with it"
        )
    return "is not a .safetensors file; use the one that is published"


def _kind(path: Path, keys: Collection[str]) -> str:
    """Returns which of `KINDS` the keys are; raises InputError for everything else."""
    marks = [key for key in keys if ".perceiver_resampler." in key or "_lora." in key]
    if FACE_ID in keys and KINDS["plain"].own not in keys:
        marks.append(FACE_ID)
    if marks:
        raise InputError(
            f"{path} is a FaceID adapter ({marks[0]}), which needs a face recogniser and is not "
            "supported; use a plain, Plus or full-face IP-Adapter"
        )
    for name, kind in KINDS.items():
        if kind.own in keys and any(key.startswith("ip_adapter.") for key in keys):
            return name
    raise InputError(
        f"{path} is not an IP-Adapter for Stable Diffusion 1 or XL, whose weights are image_proj.* "
        "and ip_adapter.*; use one of those in h94/IP-Adapter on the Hub"
    )


def _encoder(path: Path, kind: Kind, reads: StoredTensor) -> tuple[Path, dict[str, StoredTensor]]:
    """Finds the image encoder of an adapter; returns its folder and its weights.

    Args:
      path: the adapter's file.
      kind: the adapter's.
      reads: the first weight of its image projection.
    """
    above = path.parent / ".."
    places = (path.parent, above, *(above / name for name in PUBLISHED))
    folders = [place / ENCODER for place in places]
    others = []
    for folder in dict.fromkeys(each.resolve() for each in folders if each.is_dir()):
        names = [file.name for file in folder.iterdir()]
        chosen = choose({ENCODER: names}, None, folder.parent, {ENCODER: IMAGE_ENCODER})[ENCODER]
        tensors = read_weights(IMAGE_ENCODER, folder / chosen)
        made = tensors[OUTPUT].shape[kind.axis :] if OUTPUT in tensors else ()
        if made[:1] == reads.shape[1:]:
            return folder, tensors
        others.append(f"{folder} (which makes {made[0] if made else 'none'})")
    if not others:
        raise InputError(
            f"IP-Adapter {path} has no folder {ENCODER} beside it or above it; download its image "
            "encoder with it"
        )
    raise InputError(
        f"IP-Adapter {path} reads vectors of {list(reads.shape[1:])} numbers, which are not those "
        f"of {', '.join(others)}; put its own image encoder in a folder {ENCODER} beside it"
    )
