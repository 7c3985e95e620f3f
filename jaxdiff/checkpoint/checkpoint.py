"""A checkpoint: its configs, the places of its weights, its tokenizers. Imports no JAX.

A diffusers directory and a single file in the original naming are the same thing to their users.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxdiff.checkpoint import single_file, sources
from jaxdiff.checkpoint.components import (
    CONFIGS,
    INDEX,
    NETWORKS,
    TOKENIZER_FILES,
    TOKENIZERS,
    read_json,
)
from jaxdiff.checkpoint.fingerprint import fingerprint
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.checkpoint.tokenizer_files import check_tokenizer
from jaxdiff.checkpoint.weight_files import NoVariantError, choose, no_index, read_weights
from jaxdiff.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {file.parent.name: file.parent for file in sorted(ASSETS.glob(f"*/{INDEX}"))}

PIPELINE = "StableDiffusionPipeline"
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
DEFAULTS = {  # pipeline: (steps, guidance scale) of its __call__ in diffusers
    PIPELINE: (50, 7.5),
    "LatentConsistencyModelPipeline": (4, 8.5),
    **dict.fromkeys(XL_PIPELINES, (50, 5.0)),
}
# Our own entry of `model_index.json`: the {"steps", "guidance_scale"} that a model is made for.
# diffusers passes over what begins with an underscore.
OWN_DEFAULTS = "_defaults"
SAMPLER_OF_SCHEDULER = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
OTHER_NOISE_LEVELS = ("EDM", "FlowMatch")  # how the names of schedulers with these begin
CLIP_SAMPLE_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
BEFORE_0_9 = re.compile(r"0\.[0-8](\.|$)")  # a version of diffusers


@dataclass(frozen=True)
class Checkpoint:
    """A complete Stable Diffusion pipeline on this machine; `open_checkpoint` makes it.

    Attributes:
      path: the diffusers directory, or the single file.
      name: "shapes64" for the bundled model, a Hub id, or the directory's or file's own name.
      index: the parsed `model_index.json`.
      configs: the parsed configs, by component: the networks, and "scheduler".
      tensors: by network, where each weight lies.
      tokenizers: by text encoder, the folder of the tokenizer that feeds it.
      files: every file that decides pixels, by its name within the checkpoint.
    """

    path: Path
    name: str
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

        A text encoder's keys are without the "text_model." that most files put before them.
        """
        return self.tensors[network]

    def tokenizer(self, text_encoder: str) -> Path:
        """The folder of the tokenizer that feeds "text_encoder" or "text_encoder_2"."""
        return self.tokenizers[text_encoder]

    @property
    def pipeline(self) -> str:
        """The class of the pipeline in diffusers."""
        return self.index["_class_name"]

    @property
    def networks(self) -> tuple[str, ...]:
        """Of "text_encoder", "text_encoder_2", "unet" and "vae" those that it has."""
        return tuple(self.tensors)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Of the networks those that encode text."""
        return tuple(self.tokenizers)

    @property
    def family(self) -> str:
        """Such as "Stable Diffusion XL"; from the configs, whatever the name says."""
        if self.pipeline in XL_PIPELINES:
            alone = "text_encoder" not in self.networks
            return "Stable Diffusion XL refiner" if alone else "Stable Diffusion XL"
        second = self.config("unet").get("use_linear_projection")
        return "Stable Diffusion 2" if second else "Stable Diffusion 1"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every file that decides pixels, whatever the checkpoint is called."""
        return fingerprint(self.files)

    @cached_property
    def scheduler(self) -> dict:
        """The scheduler's config as the pipeline of diffusers uses it.

        `StableDiffusionPipeline` corrects two values that early files have wrong or leave out.
        What the file leaves out is listed, as there, in "_use_default_values": a scheduler of
        another class that is made from this config takes its own default instead.
        """
        config = self.config("scheduler")
        if self.pipeline != PIPELINE:
            return config
        clips = config.get("clip_sample", config.get("_class_name") in CLIP_SAMPLE_BY_DEFAULT)
        corrected = {"steps_offset": 1} | ({"clip_sample": False} if clips is True else {})
        left_out = [key for key in corrected if key not in config]
        return config | corrected | ({"_use_default_values": left_out} if left_out else {})

    @cached_property
    def size_multiple(self) -> int:
        """What width and height must be multiples of, in pixels.

        It is the autoencoder's factor alone: where a U-Net halves an odd number of latents, it
        crops on the way up, as diffusers does.
        """
        channels = self.config("vae").get("block_out_channels", ())
        if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= 16:
            raise InputError(f"{self._place('vae')}: no usable block_out_channels")
        return 2 ** (len(channels) - 1)

    @cached_property
    def default_size(self) -> tuple[int, int]:
        """The (width, height) in pixels that the U-Net was trained for."""
        config = self.config("unet")
        size = config.get("sample_size")
        if self.pipeline == PIPELINE and type(size) is int and 0 < size < 64:
            # As the pipeline does: early files of Stable Diffusion 1 say 32.
            early = BEFORE_0_9.match(str(config.get("_diffusers_version", "")))
            size = 64 if early else size
        latents = size if isinstance(size, list | tuple) else [size, size]  # height, width
        if len(latents) != 2 or not all(type(side) is int and side > 0 for side in latents):
            raise InputError(
                f"{self._place('unet')}: sample_size = {size!r} gives no default size; ask for a "
                "--width and a --height"
            )
        return latents[1] * self.size_multiple, latents[0] * self.size_multiple

    @property
    def default_steps(self) -> int:
        """The steps that the model says it is made for, or its pipeline of diffusers takes."""
        return self._defaults[0]

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale, likewise."""
        return self._defaults[1]

    @cached_property
    def default_sampler(self) -> str:
        """The sampler that the checkpoint's scheduler config names.

        Raises:
          InputError: if it names one that is not built.
        """
        config = self.config("scheduler")
        scheduler = config.get("_class_name")
        if not isinstance(scheduler, str) or scheduler not in SAMPLER_OF_SCHEDULER:
            samplers = sorted({*SAMPLER_OF_SCHEDULER.values(), "dpmpp_2m_sde"})
            raise InputError(
                f"{self._place('scheduler')} names {scheduler}, which is not built; ask for a "
                f"--sampler: {', '.join(samplers)}"
            )
        sampler = SAMPLER_OF_SCHEDULER[scheduler]
        if sampler == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
            return "dpmpp_2m_sde"
        return sampler

    @cached_property
    def latent_channels(self) -> int:
        """The channels of the autoencoder's latents."""
        channels = self.config("vae").get("latent_channels", 4)
        if type(channels) is not int or channels < 1:
            raise InputError(
                f"{self._place('vae')}: latent_channels = {channels!r} must be a positive number"
            )
        return channels

    @property
    def _defaults(self) -> tuple[int, float]:
        steps, guidance_scale = DEFAULTS[self.pipeline]
        said = self.index.get(OWN_DEFAULTS)
        said = said if isinstance(said, dict) else {}
        return said.get("steps", steps), said.get("guidance_scale", guidance_scale)

    def _place(self, component: str) -> Path:
        """The file that says a component's config, for messages."""
        return self.files.get(f"{component}/{CONFIGS[component]}", self.path)


def open_checkpoint(model: str | Path, variant: str | None = None) -> Checkpoint:
    """Finds a checkpoint, fetches it if it is elsewhere, and checks that it is complete.

    Args:
      model: a bundled model's name, such as "shapes64"; the path of a diffusers directory or of a
        single .safetensors file; a Hub id, "owner/name" or "owner/name@revision"; or a URL that
        fsspec opens, such as "gs://bucket/name".
      variant: which weights, such as "fp16". A network without them gives its full ones; without
        a variant asked for, a network without full ones gives its fp16 or bf16 ones.

    Raises:
      InputError: for what is no Stable Diffusion checkpoint, or a file that is missing, cut short
        or not what it should be; NoVariantError, which is one, where nothing has the variant.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise InputError(f'variant {variant!r} must be a word like "fp16"')
    try:
        return _open(model, variant)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"model {str(model)!r} cannot be read ({reason})") from error


def _open(model: str | Path, variant: str | None) -> Checkpoint:
    path = BUNDLED.get(model) or sources.local_path(str(model), variant)
    if path.is_dir():
        return _open_directory(path, _name(str(model), path), variant)
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(
            f"{path} is no .safetensors file, and nothing else is safe to read; convert it with "
            "PyTorch diffusers: StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    if path.is_file() and variant is not None:
        raise NoVariantError(f"{path} is a single file and has no variants; ask for none")
    if path.is_file():
        return _open_single_file(path)
    raise InputError(
        f"model {str(model)!r} is neither a diffusers directory, nor a .safetensors file, nor a "
        f'Hub id ("owner/name"), nor bundled ({", ".join(BUNDLED)})'
    )


def _name(model: str, path: Path) -> str:
    """What people call a directory that they asked for as `model`."""
    if sources.URL.match(model):
        return model.rstrip("/").rpartition("/")[2]
    return path.resolve().name if Path(model).exists() else model


def _open_directory(path: Path, name: str, variant: str | None) -> Checkpoint:
    if not (path / INDEX).exists():
        if (path.absolute().parent / INDEX).is_file():
            raise InputError(f"{path} holds no {INDEX}: it is a part of a model; name its parent")
        raise InputError(no_index(str(path), "directory", _listing(path)))
    index = read_json(path / INDEX)
    networks = _networks(path / INDEX, index)
    chosen = choose({network: _listing(path / network) for network in networks}, variant, path)
    tensors = {
        network: read_weights(network, path / network / file) for network, file in chosen.items()
    }
    tokenizers = {
        network: path / folder for network, folder in TOKENIZERS.items() if network in networks
    }
    configs = {component: f"{component}/{CONFIGS[component]}" for component in networks}
    configs["scheduler"] = f"scheduler/{CONFIGS['scheduler']}"
    decisive = {INDEX, *configs.values()} | {
        f"{network}/{tensor.file.name}"
        for network, weights in tensors.items()
        for tensor in weights.values()
    }
    parsed = {component: read_json(path / file) for component, file in configs.items()}
    _refuse_other_noise(path / configs["scheduler"], str(parsed["scheduler"].get("_class_name")))
    return Checkpoint(
        path=path,
        name=name,
        index=index,
        configs=parsed,
        tensors=tensors,
        tokenizers=tokenizers,
        files={file: path / file for file in decisive} | _tokenizer_files(tokenizers),
    )


def _open_single_file(path: Path) -> Checkpoint:
    found = single_file.read(path)
    tensors = {network: found.weights[network] for network in NETWORKS if network in found.weights}
    tokenizers = {}
    for network, folder in TOKENIZERS.items():
        if network in tensors:
            beside = path.parent / folder
            tokenizers[network] = beside if beside.is_dir() else _usual_tokenizer(path, network)
    return Checkpoint(
        path=path,
        name=path.stem,
        index=found.index,
        configs=found.configs,
        tensors=tensors,
        tokenizers=tokenizers,
        files={"checkpoint.safetensors": path} | _tokenizer_files(tokenizers),
    )


def _usual_tokenizer(path: Path, text_encoder: str) -> Path:
    try:
        return sources.usual_tokenizer(text_encoder)
    except InputError as error:
        folder = TOKENIZERS[text_encoder]
        raise InputError(
            f"{path} holds no tokenizer: put the folder {folder!r} of a diffusers directory of the "
            f"same family beside it; or from the Hub: {error}"
        ) from error


def _listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _networks(path: Path, index: dict) -> list[str]:
    """The networks that a `model_index.json` lists, if they are a pipeline that can be run."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in DEFAULTS:
        raise InputError(
            f"{path}: {pipeline} is not supported; name a checkpoint of {', '.join(DEFAULTS)}"
        )
    # XL's refiner has the second text encoder alone.
    optional = "text_encoder" if pipeline in XL_PIPELINES else "text_encoder_2"
    networks = []
    for network, (library, class_name, _) in NETWORKS.items():
        said = index.get(network)
        if network == optional and said in (None, [None, None]):
            continue
        if said != [library, class_name]:
            raise InputError(
                f"{path}: {network} is {said}, only {[library, class_name]} is supported"
            )
        networks.append(network)
    return networks


def _refuse_other_noise(path: Path, scheduler: str) -> None:
    """Refuses what no sampler would make an image of: its scheduler's betas mean nothing."""
    if scheduler not in SAMPLER_OF_SCHEDULER and scheduler.startswith(OTHER_NOISE_LEVELS):
        raise InputError(
            f"{path}: {scheduler} has other noise levels than Stable Diffusion, which no sampler "
            "here takes (Playground 2.5 and CosXL have EDM's); name another model"
        )


def _tokenizer_files(tokenizers: dict[str, Path]) -> dict[str, Path]:
    """The tokenizers' files by their names in a checkpoint, if they are whole."""
    files = {}
    for network, folder in tokenizers.items():
        check_tokenizer(folder)
        found = {f"{TOKENIZERS[network]}/{name}": folder / name for name in TOKENIZER_FILES}
        files |= {name: path for name, path in found.items() if path.is_file()}
    return files
