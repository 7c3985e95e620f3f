"""Opens ControlNets (Zhang et al., 2023, arXiv:2302.05543): one network in a folder of its own.

Imports no JAX.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checkpoint.checkpoint import ASSETS
from jaxdiff.checkpoint.component import CONFIG, INDEX, Component
from jaxdiff.checkpoint.fingerprint import fingerprint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.checkpoint.weight_files import UNREADABLE, choose, read_weights
from jaxdiff.checks import shown
from jaxdiff.errors import InputError, suggestion

BUNDLED = {"shapes64-outlines": ASSETS / "shapes64-outlines"}
CONTROLNET = Component(library="diffusers", class_name="ControlNetModel")
FLUX_CONTROLNET = Component(library="diffusers", class_name="FluxControlNetModel")
MAX_SCALE = 10
CONTROLNET_UNION = Component(library="diffusers", class_name="ControlNetUnionModel")
# The weights that only union networks have, a row for each kind of images, by the network's class.
KINDS = {
    CONTROLNET_UNION.class_name: "task_embedding",
    FLUX_CONTROLNET.class_name: "controlnet_mode_embedder.weight",
}


@dataclass(frozen=True)
class ControlNetFiles:
    """A complete ControlNet on this machine; `open_controlnet` makes it.

    Attributes:
      path: its folder.
      config: the parsed `config.json`, with the class that the weights belong to.
      tensors: the location of each weight by its key.
      files: every file that affects the pixels, by its name in the folder.
    """

    path: Path
    config: dict
    tensors: dict[str, StoredTensor]
    files: dict[str, Path]

    @property
    def kinds(self) -> int | None:
        """The number of kinds of images that a union network knows; None for other networks."""
        stored = self.tensors.get(KINDS.get(self.config["_class_name"]))
        return stored.shape[0] if stored and stored.shape else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every file that affects the pixels, independent of the path."""
        return fingerprint(self.files)


def scaled(said: str) -> tuple[str, float]:
    """Splits "PATH" or "PATH:SCALE" into the path and the scale, 1 if it is left out.

    Raises:
      InputError: if the scale is no number from 0 to `MAX_SCALE`.
    """
    path, scale = split_number(said)
    if scale is None:
        return path, 1.0
    try:
        return path, checks.number(f"{said}: the scale", scale, 0, MAX_SCALE)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None


def split_number(said: str) -> tuple[str, str | None]:
    """Splits "PATH" or "PATH:NUMBER" into the path and the number as text, if there is one."""
    path, colon, number = said.rpartition(":")
    if not colon or Path(said).exists() or "/" in number:
        return said, None
    return path, number


def open_controlnet(said: str) -> ControlNetFiles:
    """Opens a ControlNet and checks that its files are complete; reads no weights.

    Args:
      said: "shapes64-outlines", the bundled one; or the path of a folder with `config.json` and
        safetensors weights as diffusers names them: `diffusion_pytorch_model.safetensors` or shards
        with an index. Without full weights, the variant fp16 or bf16 is used.

    Raises:
      InputError: if there is no such folder; if it holds no config, another kind of network, or no
        safetensors weights; or if a file is damaged.
    """
    try:
        return _open(said, BUNDLED.get(said, Path(said)))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"ControlNet {said!r} cannot be read ({reason})") from error


def _open(said: str, path: Path) -> ControlNetFiles:
    if not path.is_dir():
        raise InputError(f"ControlNet {said!r} {_no_folder(path)}")
    names = [file.name for file in path.iterdir()]
    if CONFIG not in names:
        remedy = "name a folder that diffusers' ControlNetModel.save_pretrained(...) has written"
        if INDEX in names:
            remedy = "it is a whole pipeline; name the folder of its ControlNet"
        raise InputError(f"{path} contains no {CONFIG}; {remedy}")
    config = read_json(path / CONFIG)
    found = config.get("_class_name")
    if found not in [each.class_name for each in (CONTROLNET, CONTROLNET_UNION, FLUX_CONTROLNET)]:
        raise _unsupported(path / CONFIG, found)
    # The folder is its own parent's network.
    chosen = choose({path.name: names}, None, path.parent, {path.name: CONTROLNET})[path.name]
    tensors = read_weights(CONTROLNET, path / chosen)
    if KINDS[CONTROLNET_UNION.class_name] in tensors:  # published configs name the other class
        config["_class_name"] = CONTROLNET_UNION.class_name
    weights = {tensor.file.name: tensor.file for tensor in tensors.values()}
    return ControlNetFiles(
        path=path,
        config=config,
        tensors=tensors,
        files={CONFIG: path / CONFIG, **weights},
    )


def _no_folder(path: Path) -> str:
    """Says what is there instead of a ControlNet's folder, and what to do."""
    if not path.is_file():
        hint = suggestion(str(path), BUNDLED)
        return f"is not a folder on this machine; download it, or correct the path{hint}"
    if path.name.endswith(UNREADABLE):
        return (
            "is not a safetensors file, and other formats are not safe to read; convert it with "
            "PyTorch diffusers: ControlNetModel.from_single_file(...).save_pretrained(...)"
        )
    return f"is a file; name a folder with {CONFIG} and {CONTROLNET.weights_file}"


def _unsupported(file: Path, found: object) -> InputError:
    return InputError(
        f"{file}: {shown(found)} is not supported; use a {CONTROLNET.class_name} for Stable "
        f"Diffusion 1, 2 or XL, a {CONTROLNET_UNION.class_name} for XL, or a "
        f"{FLUX_CONTROLNET.class_name} for FLUX.1"
    )
