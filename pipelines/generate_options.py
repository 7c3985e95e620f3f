"""The options of `jaxdiff generate`, from the command line or a TOML file. Does not import Beam."""

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checkpoint import controlnet, lora
from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.checkpoint.controlnet import scaled, split_number
from jaxdiff.dataset import settings
from jaxdiff.dataset.settings import Settings
from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.errors import InputError
from jaxdiff.families import second_pass
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.families.opening import open_ensemble
from jaxdiff.request import OPTION_CHECKS
from pipelines import dates
from pipelines import target as targets
from pipelines.command_line import Parser
from pipelines.spellings import suggest
from pipelines.target import Target

DESCRIPTION = """\
Generate an image for every prompt in a manifest, and write a finished dataset to a directory. If it
is interrupted, run the same command again to continue.

A manifest is a text file with one prompt per line, or JSON Lines, CSV, TSV, Parquet or a JSON list
(each may be gzipped). It has a column `prompt` and, optionally, id, negative_prompt, seed or seeds,
num_images, width, height, steps, guidance_scale, sampler; to begin with another image: image,
strength, mask_image, outpaint, image_guidance_scale; for ControlNets: control_image,
controlnet_conditioning_scale, control_guidance_start, control_guidance_end, control_mode; for
IP-Adapters: ip_adapter_image, ip_adapter_scale. Other columns are copied to the images' metadata. A
manifest can also be several files, as a glob, a folder of text files with one prompt each, or a
dataset of images.
"""
EPILOG = """\
examples:
  jaxdiff generate --prompt "a red circle above a blue square" --output out/first
  jaxdiff generate --manifest prompts.txt --output out/many --num-images 4

You can also put options in a TOML file (`steps = 30`): jaxdiff generate JOB.toml. Command-line
options override the file. Options not listed here are passed to Apache Beam, such as
--runner FlinkRunner --flink_master host:8081.

exit codes: 0 success, every valid row has its images; 1 failed part-way, run the same command to
continue; 2 the command or its input cannot be used, nothing was written; 3 finished, but the images
in failed.jsonl could not be generated; 75 stopped by a signal, run the same command to continue
"""


STANDARD_INPUT = "-"
PROMPTS = "command-line.txt"  # the name of a manifest of the command line's prompts


@dataclass(frozen=True)
class Models:
    """The model and its additions, as arguments of `jaxdiff.load`."""

    model: str
    variant: str | None = None
    refiner: str | None = None
    lora: tuple[str, ...] = ()
    base: str | None = None
    controlnet: tuple[str, ...] = ()
    ip_adapter: tuple[str, ...] = ()
    upscale: str | None = None

    def open(self) -> Ensemble:
        """Opens the models; raises InputError if one is missing or incomplete."""
        return open_ensemble(**vars(self))

    def anywhere(self) -> "Models":
        """Returns the same models with absolute paths, for other working directories."""
        files = tuple(
            f"{_absolute(file)}:{weight!r}" for file, weight in map(lora.parse, self.lora)
        )
        refiner, base = (model and _absolute(model) for model in (self.refiner, self.base))
        nets, adapters = (
            tuple(f"{_absolute(path)}:{scale!r}" for path, scale in map(scaled, said))
            for said in (self.controlnet, self.ip_adapter)
        )
        upscale = self.upscale
        if upscale is not None and not second_pass.is_asked(upscale):
            path, factor = split_number(upscale)
            upscale = _absolute(path) + ("" if factor is None else f":{factor}")
        model = _absolute(self.model)
        return Models(model, self.variant, refiner, files, base, nets, adapters, upscale)

    def planned(self) -> dict:
        """Returns the models as plans store them: earlier versions do not know all."""
        later = ("base", "controlnet", "ip_adapter", "upscale")
        return {name: said for name, said in vars(self).items() if name not in later or said}


def _absolute(model: str) -> str:
    # On another host, a bundled model may have another path; a directory must have the same one.
    is_bundled = model in BUNDLED or model in controlnet.BUNDLED
    return str(Path(model).absolute()) if Path(model).exists() and not is_bundled else model


@dataclass(frozen=True)
class Workers:
    """The processes that generate images on a host.

    Attributes:
      count: their number. Each has its share of the host's GPUs; they share the CPU cores.
      patience: the seconds a batch may take, including loading and compilation.
      profile: a folder for traces of a few batches of each process, or None.
    """

    count: int = 1
    patience: float = 3600.0
    profile: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A parsed command.

    Attributes:
      manifest: a path, a glob, a URL, or "-" for standard input; with `prompts` or `content`, only
        a name.
      prompts: those of the command line, without line breaks.
      content: the file of a manifest that has no other place.
      settings: the given values only, unchecked, by `Settings`' names.
    """

    manifest: str
    prompts: tuple[str, ...] = ()
    content: Path | None = None
    output: str | Path
    models: Models
    settings: dict
    workers: Workers = Workers()
    overwrite: bool = False
    strict: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    measure: bool = False
    target: Target | None = None
    price_per_chip_hour: float | None = None
    image_root: str | None = None
    if_missing: str = "fail"


def parse(arguments: list[str]) -> tuple[Job, list[str]]:
    """Reads the command line and the job file, if it names one.

    Returns:
      The job, and the remaining arguments for Beam.

    Raises:
      InputError: if the job file cannot be used or an option is missing, or a date.
    """
    parser = _parser()
    said, rest = parser.parse_known_args([_with_hyphens(word) for word in arguments])
    said = {name: value for name, value in vars(said).items() if value is not None}
    if rest and not rest[0].startswith("-"):
        said = _read_job(Path(rest.pop(0))) | said
    for before, word in zip(["", *rest], rest, strict=False):
        if not word.startswith("-") and (not before.startswith("-") or "=" in before):
            parser.error(f"unexpected {word!r}")
    prompts = _prompts(said)
    if said.get("measure") and not said.get("dry_run"):
        raise InputError("--measure is for a dry run: add --dry-run, or leave it out")
    if "manifest" not in said:
        parser.missing("--manifest", rest, "; or give a --prompt", others=["prompt"])
    if "output" not in said:
        parser.missing("--output", rest)
    return _job(said, prompts), rest


def from_python(said: dict) -> Job:
    """Reads options that are given by name, as in a job file; None counts as not given.

    Raises:
      InputError: as `parse` does.
    """
    said = {name: _with_paths(value) for name, value in said.items() if value is not None}
    _check_types(said, "make_dataset")
    return _job(said)


def _with_paths(value):
    """Returns an option's value, or several in a list, with paths as text."""
    if isinstance(value, list | tuple):
        return [_with_paths(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _job(said: dict, prompts: tuple[str, ...] = ()) -> Job:
    said = dates.filled(said)
    return Job(
        manifest=said["manifest"],
        prompts=prompts,
        output=said["output"],
        models=_models(said),
        settings={name: said[name] for name in settings.NAMES if name in said},
        workers=_workers(said),
        target=targets.parse(said),
        price_per_chip_hour=targets.price(said),
        image_root=_image_root(said.get("image_root")),
        if_missing=_if_missing(said.get("if_missing", Job.if_missing)),
        **{name: bool(said.get(name)) for name in FLAGS},
    )


def _prompts(said: dict) -> tuple[str, ...]:
    """Returns the prompts of the command line, and names them as the manifest."""
    prompts = _several(said, "prompt")
    if not prompts:
        return ()
    if "manifest" in said:
        raise InputError("--prompt replaces --manifest; use one of them")
    for prompt in prompts:
        if not prompt.strip() or re.search(r"[\r\n]", prompt):
            raise InputError(
                f"--prompt {checks.shown(prompt)} must be one line of text; repeat --prompt for "
                "further prompts"
            )
    said["manifest"] = PROMPTS
    return prompts


def _with_hyphens(word: str) -> str:
    """Replaces the underscores in the name of one of our options with hyphens."""
    name, equals, value = word.partition("=")
    is_ours = name.startswith("--") and name[2:] in OPTIONS
    return name.replace("_", "-") + equals + value if is_ours else word


def _models(said: dict) -> Models:
    several = {name: _several(said, name) for name in ("lora", "controlnet", "ip_adapter")}
    others = {name: said.get(name) for name in ("variant", "refiner", "base", "upscale")}
    return Models(said.get("model", "shapes64"), **several, **others)


def _several(said: dict, name: str) -> tuple[str, ...]:
    """Returns the values of an option that may be repeated; a job file may have one alone."""
    values = said.get(name, ())
    return (values,) if isinstance(values, str) else tuple(values)


def _workers(said: dict) -> Workers:
    try:
        count = checks.integer("--workers", said.get("workers", Workers.count), 1, 1024)
        patience = checks.number("--patience", said.get("patience", Workers.patience), 1, 10**7)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None
    profile = said.get("profile")
    return Workers(count, patience, profile and _trace_folder(profile))


def _trace_folder(profile: str) -> str:
    """Returns its absolute path after checking that it can be made; JAX makes it."""
    path = Path(profile).absolute()
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
        usable = there.is_dir() and os.access(there, os.W_OK)
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        usable = False
    if not usable:
        raise InputError(f"--profile {checks.shown(profile)} is no folder to write to; name one")
    return str(path)


def _image_root(said: str | None) -> str | None:
    if said is None or "://" in said:
        return said
    if not Path(said).is_dir():
        raise InputError(f"--image-root {checks.shown(said)} is not a folder; name one")
    return str(Path(said).absolute())


def _if_missing(said) -> str:
    try:
        return checks.choice("--if-missing", said, ("fail", "skip"))
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None


def _read_job(path: Path) -> dict:
    if path.suffix != ".toml":
        raise InputError(f"unexpected {str(path)!r}: use --manifest FILE for a manifest")
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except (OSError, RecursionError, ValueError) as problem:
        raise InputError(f"job file {path} cannot be read: {problem}") from None
    said = {name.replace("-", "_"): value for name, value in said.items()}
    _check_types(said, f"job file {path}")
    return said


def _check_types(said: dict, where: str) -> None:
    """Raises InputError for an unknown option, or one of a type that no other check rejects."""
    for name, value in said.items():
        if name not in OPTIONS:
            raise InputError(f"{where}: unknown option {name!r}{suggest(name, OPTIONS)}")
        is_flag = name in FLAGS
        if is_flag and not isinstance(value, bool):
            raise InputError(f"{where}: {name} must be true or false, not {value!r}")
        several = value if name in REPEATED and isinstance(value, list) else [value]
        if name in NAMES and not all(isinstance(each, str) for each in several):
            raise InputError(f"{where}: {name} must be text, not {value!r}")


def _parser() -> Parser:
    parser = Parser(
        "generate",
        usage="jaxdiff generate [JOB.toml] --manifest FILE|--prompt TEXT --output DIR [option ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    for title, options in HELP.items():
        group = parser.add_argument_group(title)
        for name, (value, text) in options.items():
            flag = f"--{name.replace('_', '-')}"
            if value is None:
                group.add_argument(flag, action="store_true", default=None, help=text)
            else:
                action = "append" if name in REPEATED else "store"
                argument = group.add_argument(flag, metavar=value, action=action, help=text)
                if name in CHOICES:
                    argument.completer = lambda name=name, **_: CHOICES[name]
    return parser


MODEL = (
    "a bundled model, a diffusers directory, a .safetensors or .gguf file, a Hub id, or a gs:// or "
    "s3:// URL (default: shapes64)"
)
# For each group: an option's name, its metavar (None: a flag), and its help text.
HELP = {
    "input and output": {
        "manifest": (
            "FILE",
            "the prompts: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, optionally .gz; a "
            "folder of .txt files with one prompt each; or a quoted glob; local, gs:// or s3://; "
            "or - for standard input: JSON Lines, or a table with a column prompt, or one prompt "
            "per line",
        ),
        "prompt": (
            "TEXT",
            "a prompt, in place of --manifest; may be repeated, and works like a text file with "
            "these lines",
        ),
        "prompt_column": ("NAME", "the manifest's column of prompts (default: prompt)"),
        "image_root": (
            "DIR",
            "the folder, or its gs:// or s3:// URL, that the manifest's paths of images are "
            "relative to (default: the manifest's folder)",
        ),
        "output": (
            "DIR",
            "the dataset's directory, or its s3://, gs:// or az:// address: a new one, or one to "
            "continue",
        ),
        "date": (
            "YYYY-MM-DD",
            "the day that replaces {date} in --manifest and --output (default: the environment "
            "variable JAXDIFF_DATE)",
        ),
        "if_missing": (
            "fail|skip",
            "what to do if the manifest does not exist; skip ends with exit code 0 and writes "
            "nothing (default: fail)",
        ),
        "model": ("MODEL", MODEL),
        "base": (
            "MODEL",
            "for a single file without text encoders or other parts: the model to take them from, "
            "a diffusers directory, a Hub id or a URL, such as black-forest-labs/FLUX.1-dev",
        ),
        "variant": (
            "NAME",
            "the weights to use, such as fp16 (default: the full weights)",
        ),
        "refiner": ("MODEL", "a second model for the last steps, such as the SDXL refiner"),
        "lora": (
            "FILE[:WEIGHT]",
            "a LoRA (.safetensors), or the directory of one, to add to the model's weights; may be "
            "repeated",
        ),
        "controlnet": (
            "DIR[:SCALE]",
            "a ControlNet that steers each image by the row's control_image; may be repeated",
        ),
        "ip_adapter": (
            "FILE[:SCALE]",
            "an IP-Adapter (.safetensors, its image_encoder/ beside or above it), which makes the "
            "row's ip_adapter_image a part of the prompt; may be repeated",
        ),
        "upscale": (
            "MODEL[:FACTOR]",
            "a GAN upscaler (.safetensors) that enlarges every image, such as shapes64-x4, and by "
            "how much (default: as much as it can); or latent:1.5,strength=0.4, which enlarges "
            "the latents and denoises them again",
        ),
        "limit": ("N", "generate only the first N images of the manifest"),
        "overwrite": (
            None,
            "start over; the old run is deleted once the first new shard is made",
        ),
        "strict": (
            None,
            "generate nothing if a row of the manifest cannot be used, or asks for something that "
            "has another effect, or none: a prompt that is too long, another tool's syntax, a "
            "negative prompt without guidance, a column that looks like a setting",
        ),
        "retry_failed": (None, "retry the images in failed.jsonl"),
        "dry_run": (
            None,
            "generate nothing; print the plan, and estimates of the time and of the disk space",
        ),
        "measure": (
            None,
            "with --dry-run: load the model and time two batches on this machine",
        ),
    },
    "defaults for rows that do not set them": {
        "num_images": ("N", f"images per prompt (default: {Settings.num_images})"),
        "seed": ("N", "job seed; each image's seed is derived from it (default: 0)"),
        "width": ("PX", "image width (default: the size that the model was trained for)"),
        "height": ("PX", "image height (default: the size that the model was trained for)"),
        "steps": ("N", "denoising steps (default: the model's; 20 for shapes64)"),
        "guidance_scale": (
            "W",
            "how closely to follow the prompt; 1 or less is off (default: the model's; 1.5 for "
            "shapes64)",
        ),
        "sampler": ("NAME", f"{', '.join(SAMPLERS)} (default: the model's)"),
        "negative_prompt": ("TEXT", "what to avoid in the image (default: nothing)"),
        "strength": (
            "SHARE",
            "for rows with an image: how much to change it, 0 to 1 (default: as in the model's "
            "diffusers pipeline, such as 0.8)",
        ),
    },
    "output files": {
        "format": ("NAME", f"{' or '.join(settings.FORMATS)} (default: webdataset)"),
        "image_format": ("NAME", "png, webp (lossless) or jpeg (default: png)"),
        "images_per_shard": (
            "N",
            "images per shard, rounded to full batches (default: 1000; fewer above 512x512)",
        ),
    },
    "sampling, for all images": {
        "scheduler": (
            "KEY=VALUE,...",
            "overrides for scheduler_config.json, such as "
            "use_karras_sigmas=true,timestep_spacing=trailing",
        ),
        "noise": ("NAME", "jax, or torch to draw the same noise as PyTorch (default: jax)"),
        "eta": ("ETA", "ddim only: how much of the noise is drawn anew, 0 to 1 (default: 0)"),
        "guidance_rescale": ("PHI", "reduce overexposure by guidance, 0 to 1 (default: 0, off)"),
        "guidance_start": (
            "SHARE",
            "fraction of the steps before guidance starts (default: 0)",
        ),
        "guidance_stop": ("SHARE", "fraction of the steps after which guidance stops (default: 1)"),
        "clip_skip": ("N", "number of the text encoder's last layers to skip (default: 0)"),
        "prompt_chunks": (
            "N",
            "maximum chunks of 75 tokens per prompt; longer prompts are cut (default: 1)",
        ),
        "refiner_start": (
            "SHARE",
            "fraction of the noise schedule done before the refiner takes over (default: 0.8)",
        ),
        "deep_cache": (
            "N",
            "run the whole U-Net only at every Nth evaluation, and its outermost layers at the "
            "others: faster, slightly worse images (default: 1, off)",
        ),
        "skip_layers": (
            "N,...",
            "layers to leave out in skip-layer guidance, such as 7,8,9 for Stable Diffusion 3.5 "
            "medium; early steps take 1.5 times as long (default: none)",
        ),
        "keep_unmasked": (
            "on|off",
            "for rows with a mask: whether to paste what it leaves out from the original image "
            "(default: on)",
        ),
        "preprocess": (
            "NAME",
            "canny to show ControlNets the edges of their images (default: none, the images "
            "themselves)",
        ),
        "guess_mode": (
            "on|off",
            "let ControlNets guess what to draw from the image alone (default: off)",
        ),
    },
    "performance": {
        "weights": (
            "KIND",
            "int8 or fp8: keep most weights in 8 bits, half of the memory of bfloat16; w8a8: int8, "
            "and multiply 8-bit integers in linear layers, which TPUs do faster; all change the "
            "images slightly (default: full, in --dtype)",
        ),
        "text_encoders": (
            "PLACE",
            "host: keep text encoders in the host's memory and run them on its CPU, where a device "
            "has no room for them (default: device)",
        ),
        "batch_size": (
            "N",
            "images computed at once on each device, or auto: as many as fit, up to 64; a CPU uses "
            f"its own number (default: {Settings.batch_size})",
        ),
        "dtype": ("NAME", "float32 or bfloat16 (default: float32)"),
        "mesh": ("AXES", "device mesh, such as data=4,model=2 (default: all devices for data)"),
        "workers": ("N", "number of processes, each with its share of the GPUs (default: 1)"),
        "patience": (
            "SECONDS",
            "time limit for a batch, including loading and compilation; then its process is "
            f"restarted (default: {Workers.patience:g})",
        ),
        "profile": (
            "DIR",
            "folder for a trace of a few batches, for TensorBoard or Perfetto",
        ),
    },
    "dry run for a TPU slice": targets.HELP,
}
OPTIONS = {name: value for group in HELP.values() for name, (value, _) in group.items()}
NAMES = (  # always text, even if it looks like a number
    *("manifest", "prompt_column", "image_root", "output", "model", "base", "variant", "refiner"),
    *("prompt", "lora", "controlnet", "ip_adapter", "upscale", "profile", "target"),
)
CHOICES = {  # for a shell to complete
    "sampler": (*SAMPLERS,),
    **{
        name: arguments[0]
        for name, (check, *arguments) in (settings.CHECKS | OPTION_CHECKS).items()
        if check is checks.choice
    },
}
REPEATED = ("prompt", "lora", "controlnet", "ip_adapter")
FLAGS = tuple(name for name, value in OPTIONS.items() if value is None)
