"""Where a diffusers directory keeps its parts, and whether they are whole. Imports no JAX."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.errors import InputError

BUNDLED = {"shapes64": Path(__file__).parents[1] / "assets" / "shapes64"}

PIPELINE = "StableDiffusionPipeline"
NETWORKS = {  # component: (its library, its class, its file of weights)
    "text_encoder": ("transformers", "CLIPTextModel", "model.safetensors"),
    "unet": ("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model.safetensors"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model.safetensors"),
}
CONFIGS = {
    **{component: "config.json" for component in NETWORKS},
    "scheduler": "scheduler_config.json",
}
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
SAMPLER_OF_SCHEDULER = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
MAX_JSON_BYTES = 64_000_000
END_OF_WORD = "</w>"
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<\w+>")  # <|endoftext|>, <unk>: made by no merge


@dataclass(frozen=True)
class Checkpoint:
    """A complete diffusers directory of a Stable Diffusion pipeline; `open_checkpoint` makes it.

    Attributes:
      path: the directory.
      name: "shapes64" for the bundled model, else the directory's own name.
    """

    path: Path
    name: str

    def config(self, component: str) -> dict:
        """The parsed config of "unet", "vae", "text_encoder" or "scheduler"."""
        return read_json(self.path / component / CONFIGS[component])

    def weights(self, component: str) -> tuple[Path, ...]:
        """The safetensors files that together hold the weights of a network."""
        folder = self.path / component
        path = folder / NETWORKS[component][2]
        if path.is_file():
            return (path,)
        others = sorted(
            other.name
            for pattern in ("*.safetensors*", "*.bin", "*.ckpt", "*.pt", "*.msgpack")
            for other in folder.glob(pattern)
        )
        found = (
            f"; {others[0]} beside it cannot be read: write the checkpoint again with PyTorch "
            "diffusers' save_pretrained, as one safetensors file a component"
            if others
            else "; copy the checkpoint again"
        )
        raise InputError(f"{path} is missing{found}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every file that decides pixels, whatever the directory is called."""
        files = [
            self.path / "model_index.json",
            *(self.path / component / name for component, name in CONFIGS.items()),
            *(path for component in NETWORKS for path in self.weights(component)),
            *(self.path / "tokenizer" / name for name in TOKENIZER_FILES),
        ]
        digest = hashlib.sha256()
        for path in sorted(path for path in files if path.is_file()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content}  {path.relative_to(self.path).as_posix()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def size_multiple(self) -> int:
        """What width and height must be multiples of, in pixels.

        It is the autoencoder's factor alone: where a U-Net halves an odd number of latents, it
        crops on the way up, as diffusers does.
        """
        channels = self.config("vae").get("block_out_channels", ())
        if not isinstance(channels, list) or not 1 <= len(channels) <= 16:
            raise InputError(f"{self.path / 'vae' / 'config.json'}: no usable block_out_channels")
        return 2 ** (len(channels) - 1)

    @cached_property
    def default_size(self) -> tuple[int, int]:
        """The (width, height) in pixels that the U-Net was trained for."""
        size = self.config("unet").get("sample_size")
        latents = size if isinstance(size, list) else [size, size]  # height, width
        if len(latents) != 2 or not all(type(side) is int and side > 0 for side in latents):
            raise InputError(
                f"{self.path / 'unet' / 'config.json'}: sample_size = {size!r} gives no "
                "default size; ask for a --width and a --height"
            )
        return latents[1] * self.size_multiple, latents[0] * self.size_multiple

    @cached_property
    def default_sampler(self) -> str:
        """The sampler that the checkpoint's scheduler config names.

        Raises:
          InputError: if it names one that is not built.
        """
        scheduler = self.config("scheduler").get("_class_name")
        if scheduler not in SAMPLER_OF_SCHEDULER:
            raise InputError(
                f"{self.path / 'scheduler' / CONFIGS['scheduler']} names {scheduler}, which is "
                f"not built; ask for a --sampler: {', '.join(SAMPLER_OF_SCHEDULER.values())}"
            )
        return SAMPLER_OF_SCHEDULER[scheduler]

    @cached_property
    def latent_channels(self) -> int:
        """The channels of the autoencoder's latents."""
        return self._count("vae", "latent_channels", default=4, least=1)

    @cached_property
    def max_steps(self) -> int:
        """The most steps that every sampler can take; dpmpp_2m needs two timesteps more."""
        return self._count("scheduler", "num_train_timesteps", default=1000, least=3) - 2

    def _count(self, component: str, key: str, default: int, least: int) -> int:
        value = self.config(component).get(key, default)
        if type(value) is not int or value < least:
            raise InputError(
                f"{self.path / component / CONFIGS[component]}: {key} = {value!r} must be a whole "
                f"number from {least}"
            )
        return value


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Finds a checkpoint and checks that it is complete.

    Args:
      model: the name of a bundled model, "shapes64", or the path of a diffusers directory.

    Raises:
      InputError: for a directory that is no Stable Diffusion checkpoint, or a file that is
        missing, cut short or not what it should be.
    """
    path = BUNDLED.get(model, Path(model))
    if not path.is_dir():
        raise InputError(
            f"model {str(model)!r} is neither a directory in the diffusers layout nor bundled "
            f"({', '.join(BUNDLED)})"
        )
    checkpoint = Checkpoint(path=path, name=model if model in BUNDLED else path.resolve().name)
    _check_classes(path)
    for component in CONFIGS:
        checkpoint.config(component)
    for component in NETWORKS:
        for file in checkpoint.weights(component):
            read_header(file)
    _check_tokenizer(path / "tokenizer")
    return checkpoint


def _check_classes(path: Path) -> None:
    index_path = path / "model_index.json"
    index = read_json(index_path)
    if index.get("_class_name") != PIPELINE:
        raise InputError(
            f"{index_path}: {index.get('_class_name')} is not supported, only {PIPELINE} is"
        )
    for component, (library, class_name, _) in NETWORKS.items():
        if index.get(component) != [library, class_name]:
            raise InputError(
                f"{index_path}: {component} is {index.get(component)}, "
                f"only {[library, class_name]} is supported"
            )


def _check_tokenizer(folder: Path) -> None:
    """Raises InputError unless the tokenizer's files are there and whole."""
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        _check_merges(vocabulary, merges)
    elif not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} lacks vocab.json and merges.txt; copy the checkpoint again")


def _check_merges(vocabulary_path: Path, merges_path: Path) -> None:
    """Raises InputError unless each makes the other's tokens: cut merges would give other tokens.

    As in CLIP and GPT-2, a token is a byte's symbol, with or without `END_OF_WORD`, or a merge of
    two tokens, or special.
    """
    vocabulary = read_json(vocabulary_path)
    ids = vocabulary.values()
    if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise InputError(
            f"{vocabulary_path}: its ids are not distinct whole numbers; copy the checkpoint again"
        )
    try:
        with merges_path.open(encoding="utf-8") as file:
            lines = file.read(MAX_JSON_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{merges_path} cannot be read ({error}); copy it again") from error
    made = set()
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version"):
            continue
        pair, token = line.split(" "), line.replace(" ", "")
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, token}:
            raise InputError(
                f"{merges_path}: line {number} merges no two tokens of vocab.json into a third; "
                "copy the checkpoint again"
            )
        made.add(token)
    for token in vocabulary.keys() - made:
        if len(token.removesuffix(END_OF_WORD)) > 1 and not SPECIAL_TOKEN.fullmatch(token):
            raise InputError(
                f"{merges_path} makes no {token!r}, which vocab.json has; copy the checkpoint again"
            )


def read_json(path: Path) -> dict:
    """The JSON object in the file at `path`; raises InputError if there is none."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_JSON_BYTES))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the checkpoint again") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; copy it again")
    return value
