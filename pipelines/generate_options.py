"""What `jaxdiff generate` can be told, on the command line or in a TOML file. Imports no Beam."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checkpoint import lora
from jaxdiff.checkpoint.checkpoint import BUNDLED
from jaxdiff.dataset import settings
from jaxdiff.dataset.settings import Settings
from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble, open_ensemble
from pipelines.command_line import Parser

DESCRIPTION = """\
Make an image for every prompt in a manifest and leave a finished dataset in a directory. When it is
interrupted, the same command continues where it was.

A manifest is a text file with a prompt a line, or JSON Lines, CSV, TSV, Parquet or a JSON list
(each also .gz) with a column `prompt` and, as you like, id, negative_prompt, seed or seeds,
num_images, width, height, steps, guidance_scale, sampler; other columns are carried through to the
images' metadata. It may be several files, as a glob, and a folder of text files of one prompt each.
"""
EPILOG = """\
example:
  echo "a red circle above a blue square" > prompts.txt
  jaxdiff generate --manifest prompts.txt --output out/first --num-images 4

The options may stand in a TOML file instead (`steps = 30`): jaxdiff generate JOB.toml; what the
command line says goes first. Options that are not listed here go to Apache Beam, such as
--runner FlinkRunner --flink_master host:8081.

exit codes: 0 every valid row has its images; 1 failed part-way, the same command continues;
2 the command or its input cannot be used, nothing was written; 3 finished, but images in
failed.jsonl could not be made; 75 stopped by a signal, the same command continues
"""


@dataclass(frozen=True)
class Models:
    """What makes the images, by the names that `jaxdiff.load` takes."""

    model: str
    variant: str | None = None
    refiner: str | None = None
    lora: tuple[str, ...] = ()

    def open(self) -> Ensemble:
        """Finds them, and checks that they are complete; raises InputError."""
        return open_ensemble(self.model, self.variant, self.refiner, self.lora)

    def anywhere(self) -> "Models":
        """The same for a process with another working directory."""
        files = tuple(
            f"{_absolute(file)}:{weight!r}" for file, weight in map(lora.parse, self.lora)
        )
        refiner = self.refiner and _absolute(self.refiner)
        return Models(_absolute(self.model), self.variant, refiner, files)


def _absolute(model: str) -> str:
    # A bundled model may lie elsewhere there; a directory must be there by the same path.
    return str(Path(model).absolute()) if Path(model).exists() and model not in BUNDLED else model


@dataclass(frozen=True)
class Workers:
    """The processes that make images on a host, and how they are watched.

    Attributes:
      count: each has its share of the host's GPUs; CPU cores are shared.
      patience: seconds that a batch may take, loading and compilation included.
      profile: a folder for traces of a few batches of each process, or None.
    """

    count: int = 1
    patience: float = 3600.0
    profile: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A parsed command. `settings` has only what was said, unchecked, by `Settings`' names."""

    manifest: str
    output: Path
    models: Models
    settings: dict
    workers: Workers = Workers()
    overwrite: bool = False
    strict: bool = False
    retry_failed: bool = False
    dry_run: bool = False


def parse(arguments: list[str]) -> tuple[Job, list[str]]:
    """Reads the command line and the job file that it may name.

    Returns:
      The job, and the arguments that are left for Beam.

    Raises:
      InputError: for a job file that cannot be used, or a missing option.
    """
    parser = _parser()
    said, rest = parser.parse_known_args([_with_hyphens(word) for word in arguments])
    said = {name: value for name, value in vars(said).items() if value is not None}
    if rest and not rest[0].startswith("-"):
        said = _read_job(Path(rest.pop(0))) | said
    for before, word in zip(["", *rest], rest, strict=False):
        if not word.startswith("-") and (not before.startswith("-") or "=" in before):
            parser.error(f"unexpected {word!r}")
    for name in ("manifest", "output"):
        if name not in said:
            parser.missing(f"--{name}", rest)
    job = Job(
        manifest=said["manifest"],
        output=Path(said["output"]),
        models=_models(said),
        settings={name: said[name] for name in settings.NAMES if name in said},
        workers=_workers(said),
        **{name: bool(said.get(name)) for name in FLAGS},
    )
    return job, rest


def _with_hyphens(word: str) -> str:
    """An option of ours as it is documented, if it was written with underscores."""
    name, equals, value = word.partition("=")
    is_ours = name.startswith("--") and name[2:] in OPTIONS
    return name.replace("_", "-") + equals + value if is_ours else word


def _models(said: dict) -> Models:
    files = said.get("lora", ())
    files = (files,) if isinstance(files, str) else tuple(files)
    return Models(said.get("model", "shapes64"), said.get("variant"), said.get("refiner"), files)


def _workers(said: dict) -> Workers:
    try:
        count = checks.integer("--workers", said.get("workers", Workers.count), 1, 1024)
        patience = checks.number("--patience", said.get("patience", Workers.patience), 1, 10**7)
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None
    profile = said.get("profile")
    if profile is not None:
        try:
            Path(profile).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(f"--profile {profile}: {problem.strerror}; name a folder") from None
        profile = str(Path(profile).absolute())
    return Workers(count, patience, profile)


def _read_job(path: Path) -> dict:
    if path.suffix != ".toml":
        raise InputError(f"unexpected {str(path)!r}: a manifest is named by --manifest")
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"job file {path} cannot be read: {problem}") from None
    said = {name.replace("-", "_"): value for name, value in said.items()}
    for name, value in said.items():
        if name not in OPTIONS:
            raise InputError(f"job file {path}: unknown option {name!r}{suggest(name)}")
        is_flag = name in FLAGS
        if is_flag and not isinstance(value, bool):
            raise InputError(f"job file {path}: {name} must be true or false, not {value!r}")
        several = value if name in REPEATED and isinstance(value, list) else [value]
        if name in NAMES and not all(isinstance(each, str) for each in several):
            raise InputError(f"job file {path}: {name} must be text, not {value!r}")
    return said


def suggest(name: str) -> str:
    """What a misspelt option may have meant, as the end of a message."""
    names = [option.replace("_", "-") for option in OPTIONS]
    close = difflib.get_close_matches(name.replace("_", "-"), names, n=1)
    return f"; did you mean --{close[0]}?" if close else ""


def _parser() -> Parser:
    parser = Parser(
        "generate",
        usage="jaxdiff generate [JOB.toml] --manifest FILE --output DIR [option ...]",
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
                group.add_argument(flag, metavar=value, action=action, help=text)
    return parser


MODEL = (
    "a bundled model, a diffusers directory, a .safetensors file, a Hub id or a URL (gs://, s3://) "
    "(default: shapes64)"
)
# By group: the option's name, what it takes (None: nothing), and what it does.
HELP = {
    "what and where": {
        "manifest": (
            "FILE",
            "the prompts: .txt, .jsonl, .json, .csv, .tsv or .parquet, each also .gz; a folder of "
            ".txt files, a prompt each; a quoted glob; each also at gs:// or s3://",
        ),
        "prompt_column": ("NAME", "which of its columns holds the prompts (default: prompt)"),
        "output": ("DIR", "the dataset's directory: new, or that of the run to be continued"),
        "model": ("MODEL", MODEL),
        "variant": ("NAME", "which of a model's files, such as fp16 (default: the full ones)"),
        "refiner": ("MODEL", "a second model that takes the last steps, such as SD XL's refiner"),
        "lora": (
            "FILE[:WEIGHT]",
            "a LoRA (.safetensors) to add to the model's weights; --lora may be said again",
        ),
        "limit": ("N", "stop after the first N images of the manifest"),
        "overwrite": (None, "start anew: the old run is deleted when the first new shard is made"),
        "strict": (None, "make nothing if a row of the manifest cannot be used"),
        "retry_failed": (None, "try the images of failed.jsonl again"),
        "dry_run": (None, "make nothing: say what would be made, and how long it may take"),
    },
    "for rows that do not say": {
        "num_images": ("N", f"images of each prompt (default: {Settings.num_images})"),
        "seed": ("N", "what the images' own seeds are derived from (default: 0)"),
        "width": ("PX", "of the images (default: what the model was trained for)"),
        "height": ("PX", "of the images (default: what the model was trained for)"),
        "steps": ("N", "denoising steps (default: the model's; shapes64: 20)"),
        "guidance_scale": (
            "W",
            "how closely to follow the prompt; off up to 1 (default: the model's; shapes64: 1.5)",
        ),
        "sampler": ("NAME", f"{', '.join(SAMPLERS)} (default: the model's)"),
        "negative_prompt": ("TEXT", "what to steer away from (default: nothing)"),
    },
    "files": {
        "format": ("NAME", f"of the shards: {' or '.join(settings.FORMATS)} (default: webdataset)"),
        "image_format": ("NAME", "png, webp (lossless) or jpeg (default: png)"),
        "images_per_shard": ("N", "rounded to full batches (default: 1000, fewer if over 512x512)"),
    },
    "sampling, of all images": {
        "scheduler": (
            "KEY=VALUE,...",
            "changes to scheduler_config.json, such as "
            "use_karras_sigmas=true,timestep_spacing=trailing",
        ),
        "noise": ("NAME", "jax, or torch for the noise of PyTorch's generator (default: jax)"),
        "eta": ("ETA", "how much of ddim's noise is drawn anew, 0 to 1 (default: 0)"),
        "guidance_rescale": ("PHI", "against overexposure, 0 to 1 (default: 0)"),
        "guidance_start": ("SHARE", "of the steps that come before guidance (default: 0)"),
        "guidance_stop": ("SHARE", "of the steps after which guidance ends (default: 1)"),
        "clip_skip": ("N", "how many of the text encoder's last layers to leave out (default: 0)"),
        "prompt_chunks": (
            "N",
            "chunks of 75 tokens a prompt may have, else it is cut (default: 1)",
        ),
        "refiner_start": ("SHARE", "of the noise levels that precede the refiner (default: 0.8)"),
        "deep_cache": (
            "N",
            "compute the U-Net whole at every Nth evaluation only, its outermost layers at the "
            "others: faster, a little worse (default: 1, whole at all)",
        ),
    },
    "computing": {
        "batch_size": (
            "N",
            "images computed at once on each device, or auto: the most that fit, up to 64; a CPU "
            f"has its own number (default: {Settings.batch_size})",
        ),
        "dtype": ("NAME", "float32 or bfloat16 (default: float32)"),
        "mesh": ("AXES", "devices, such as data=4,model=2 (default: all for data)"),
        "workers": ("N", "processes, each with its share of the GPUs (default: 1)"),
        "patience": (
            "SECONDS",
            "what a batch may take before its process is restarted, loading and compiling included "
            f"(default: {Workers.patience:g})",
        ),
        "profile": (
            "DIR",
            "where to write a trace of some batches, for TensorBoard or Perfetto",
        ),
    },
}
OPTIONS = {name: value for group in HELP.values() for name, (value, _) in group.items()}
NAMES = (  # text, whatever it looks like
    *("manifest", "prompt_column", "output", "model", "variant", "refiner", "lora", "profile"),
)
REPEATED = ("lora",)
FLAGS = tuple(name for name, value in OPTIONS.items() if value is None)
