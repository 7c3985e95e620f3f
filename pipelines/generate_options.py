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
from jaxdiff.errors import InputError
from jaxdiff.families import second_pass
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.families.opening import open_ensemble
from pipelines import dates
from pipelines import target as targets
from pipelines.command_line import Parser
from pipelines.generate_help import (
    CHOICES,
    DESCRIPTION,
    EPILOG,
    FLAGS,
    HELP,
    NAMES,
    OPTIONS,
    PATIENCE,
    REPEATED,
)
from pipelines.spellings import suggest
from pipelines.target import Target

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
    patience: float = PATIENCE
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
