"""The options of `jaxdiff evaluate`. Imports neither Beam nor JAX."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from jaxdiff.dataset import settings
from jaxdiff.dataset.store import is_address, join, open_store
from jaxdiff.errors import InputError
from jaxdiff.evaluation.benchmarks import BENCHMARKS
from jaxdiff.evaluation.layouts.folders import LAYOUTS
from pipelines import generate_options, spellings
from pipelines.command_line import Parser
from pipelines.generate_options import Job

DESCRIPTION = """\
Evaluate models on a prompt benchmark: generate images (or use existing ones), measure them, and
write a report with confidence intervals. Several models or settings are compared pair by pair, with
equal seeds. If it is interrupted, run the same command again to continue.
"""
EPILOG = """\
examples:
  jaxdiff evaluate --benchmark shapes --model shapes64 --output out/judged
  jaxdiff evaluate --benchmark shapes --model A --model B --vary steps=10,20 --output out/compared
  jaxdiff evaluate --benchmark prompts --dataset out/a --dataset out/b --output out/ab
  jaxdiff evaluate --benchmark geneval --prompts evaluation_metadata.jsonl --model M --output out/g
  jaxdiff evaluate --export geneval --dataset out/first --output out/for-geneval

Options not listed here are passed to jaxdiff generate (--steps, --seed, --batch-size, ...) and to
Apache Beam (--runner, ...).

exit codes: 0 success; 1 failed part-way, run the same command to continue; 2 the command or its
input cannot be used; 3 finished, but some images could not be generated; 75 stopped by a signal,
run the same command to continue
"""
REFEREES = {"best:clip": "clip_score", "best:shapes": "correct"}


@dataclass(frozen=True)
class Candidate:
    """One run: a model with its settings, or a set of existing images.

    Attributes:
      name: distinguishes it from the others, and names its folder.
      job: generates its images; None if they already exist.
      images: the directory of the dataset or layout, or the dataset's address.
      output: the directory or the address of its scores and of the files for other programs.
    """

    name: str
    job: Job | None
    images: str | Path
    output: str | Path


@dataclass(frozen=True)
class Evaluation:
    """A parsed command.

    Attributes:
      benchmark, prompts: as in `benchmarks.read`; per_tag and prompts_seed too.
      images: the number of images per prompt; 0 to take it and the prompts from the datasets.
      output: the directory or the address of the report.
      runs: the runs to evaluate; the first is compared with each of the others.
      is_layout: whether the runs' images are in the benchmark's layout, not in a dataset.
      clip: the directory or Hub id of CLIP's weights, or "".
      reference: a folder of reference images, or an .npz of their features; or "".
      training: a folder of training images, to find copies of them; or "".
      keep: the measure that chooses the best image of each prompt; or "".
    """

    benchmark: str
    prompts: Path | None
    per_tag: int
    prompts_seed: int
    images: int
    output: str | Path
    runs: tuple[Candidate, ...]
    is_layout: bool = False
    clip: str = ""
    reference: str = ""
    training: str = ""
    keep: str = ""


@dataclass(frozen=True)
class Export:
    """A command that writes a dataset in a benchmark's layout."""

    layout: str
    dataset: str
    output: str | Path


def parse(arguments: list[str]) -> tuple[Evaluation | Export, list[str]]:
    """Reads the command line.

    Returns:
      the parsed command, and the remaining arguments for Beam.

    Raises:
      InputError: for options that are missing, unknown, or cannot be combined.
    """
    parser = _parser()
    said, rest = parser.parse_known_args(arguments)
    if not said.output:
        parser.missing("--output", rest)
    if said.export:
        if len(said.dataset) != 1:
            parser.error("--export needs one --dataset, the dataset to export")
        if rest or said.benchmark:
            parser.error(f"--export takes only --dataset and --output, not {rest or '...'}")
        return Export(said.export, *said.dataset, said.output), []
    if not said.benchmark:
        parser.missing("--benchmark", rest, f"; choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[said.benchmark]
    given = said.dataset or said.layout
    has_own = said.dataset and said.benchmark == "prompts" and not said.prompts
    if given and (said.model or said.vary):
        parser.error("--model and --vary generate images; omit them with --dataset or --layout")
    if said.dataset and said.layout:
        parser.error("--dataset and --layout both name the images; use one of them")
    if has_own and said.images:
        parser.error("--images: the dataset says how many; omit it, or name its --prompts")
    if given:
        runs, beam_arguments = _existing(said), rest
    else:
        runs, beam_arguments = _runs(said, rest)
    evaluation = Evaluation(
        benchmark=said.benchmark,
        prompts=said.prompts,
        per_tag=said.per_tag,
        prompts_seed=said.prompts_seed,
        images=0 if has_own else said.images or benchmark.images,
        output=said.output,
        runs=runs,
        is_layout=said.layout is not None,
        clip=said.clip,
        reference=said.reference,
        training=said.training,
        keep=REFEREES.get(said.keep, ""),
    )
    if evaluation.keep == "clip_score" and not said.clip:
        parser.error("--keep best:clip needs --clip, a directory or Hub id of CLIP's weights")
    if evaluation.keep == "correct" and said.benchmark != "shapes":
        parser.error("--keep best:shapes needs --benchmark shapes")
    return evaluation, beam_arguments


def _runs(said, rest: list[str]) -> tuple[tuple[Candidate, ...], list[str]]:
    """Returns a run for each model and each combination of varied settings."""
    if any(word.partition("=")[0] == "--prompt" for word in rest):
        raise InputError("--prompt is for jaxdiff generate; --prompts names a file of prompts")
    models = said.model or ["shapes64"]
    # Never in a bucket: manifests cannot be read from all of them, and the plan keeps the rows.
    folder = open_store(said.output).work() if is_address(said.output) else said.output
    common = ["--manifest", str(folder / "manifest.jsonl"), "--output", str(said.output)]
    varied = [_varied(text) for text in said.vary]
    runs, beam_arguments = [], []
    for model, *chosen in itertools.product(models, *varied):
        words = [word for name, value in chosen for word in (f"--{name}", value)]
        words += ["--model", model, *common]
        job, beam_arguments = generate_options.parse([*rest, *words])
        name = " ".join([Path(model).name, *(f"{name}={value}" for name, value in chosen)])
        runs.append(Candidate(name, job, said.output, said.output))
    runs = _apart(runs, said.output)
    for position, run in enumerate(runs):
        dataset = join(run.output, "dataset")
        runs[position] = replace(run, job=replace(run.job, output=dataset), images=dataset)
    return tuple(runs), beam_arguments


def _existing(said) -> tuple[Candidate, ...]:
    """Returns a run for each dataset, or for the layout, by its folder's name if these differ."""
    given = said.dataset or [said.layout]
    names = [Path(each).name for each in given]
    if len(set(names)) < len(names):
        names = given
    pairs = zip(names, given, strict=True)
    runs = [Candidate(name, None, images, said.output) for name, images in pairs]
    return tuple(_apart(runs, said.output))


def _apart(runs: list[Candidate], output: str | Path) -> list[Candidate]:
    """Gives several runs names of their own, and folders in the output."""
    if len(runs) == 1:
        return runs
    names = [run.name for run in runs]
    named = []
    for position, run in enumerate(runs):
        earlier = names[:position].count(run.name)
        name = f"{run.name} ({earlier + 1})" if earlier else run.name
        named.append(replace(run, name=name, output=join(output, folder_name(name))))
    return named


def folder_name(name: str) -> str:
    """Converts a run's name to a folder name."""
    kept = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name)
    return kept.strip("-.") or "run"


def _varied(text: str) -> list[tuple[str, str]]:
    name, equals, values = text.partition("=")
    name = name.replace("_", "-")
    if not equals or not values:
        raise InputError(f"--vary {text}: use NAME=VALUE,VALUE, for example steps=10,20")
    if name.replace("-", "_") not in settings.NAMES:
        hint = spellings.closest(name, settings.NAMES)
        hint = f"did you mean {hint.replace('_', '-')}?" if hint else "use one of jaxdiff generate"
        raise InputError(f"--vary {text}: unknown option {name!r}; {hint}")
    return [(name, value) for value in values.split(",")]


def _parser() -> Parser:
    parser = Parser(
        "evaluate",
        usage="jaxdiff evaluate --benchmark NAME --output DIR [option ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, how in options.items():
            group.add_argument(flag, **how)
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise InputError(f"{text!r} must be a whole number from 1 to 100000")
    return int(text)


def _where(text: str) -> str | Path:
    return text if is_address(text) else Path(text)


PATH = {"metavar": "DIR", "type": Path}
# By group: each option and its arguments for `argparse`.
OPTIONS = {
    "what to evaluate": {
        "--benchmark": {"choices": BENCHMARKS, "metavar": "NAME", "help": ", ".join(BENCHMARKS)},
        "--prompts": {
            **PATH,
            "metavar": "FILE",
            "help": "the benchmark's official prompt file (optional for shapes, and with --dataset "
            "for prompts)",
        },
        "--model": {
            "metavar": "MODEL",
            "action": "append",
            "help": "as for jaxdiff generate (default: shapes64); repeat it to compare models",
        },
        "--vary": {
            "metavar": "NAME=V,V",
            "action": "append",
            "default": [],
            "help": "compare values of an option of jaxdiff generate; may be repeated",
        },
        "--images": {
            "metavar": "N",
            "type": _number,
            "help": "images per prompt (default: the benchmark's number)",
        },
        "--per-tag": {
            "metavar": "N",
            "type": _number,
            "default": 50,
            "help": "shapes only: at most N of its own prompts per tag (default: 50)",
        },
        "--prompts-seed": {
            "metavar": "N",
            "type": int,
            "default": 6,
            "help": "shapes only: the seed that draws its own prompts (default: 6)",
        },
        "--dataset": {
            "metavar": "DIR",
            "action": "append",
            "default": [],
            "help": "evaluate an existing dataset, also at an s3://, gs:// or az:// address; "
            "generate no images; repeat it to compare datasets",
        },
        "--layout": {
            **PATH,
            "help": "evaluate existing images in the benchmark's layout",
        },
    },
    "additional measures": {
        "--clip": {
            "metavar": "DIR",
            "default": "",
            "help": "CLIP weights, a transformers or OpenCLIP directory or a Hub id: adds "
            "CLIPScore, diversity and zero-shot labels",
        },
        "--reference": {
            "metavar": "DIR",
            "default": "",
            "help": "captioned images, or features (.npz): adds distances, precision and recall",
        },
        "--training": {
            "metavar": "DIR",
            "default": "",
            "help": "captioned images: adds the shares of copies of them",
        },
    },
    "output": {
        "--output": {
            "metavar": "DIR",
            "type": _where,
            "help": "a new directory or one to continue, or an s3://, gs:// or az:// address",
        },
        "--keep": {
            "choices": REFEREES,
            "metavar": "best:WHO",
            "help": "also write the best image of each prompt: " + ", ".join(REFEREES),
        },
        "--export": {
            "choices": LAYOUTS,
            "metavar": "LAYOUT",
            "help": "only write the images of --dataset in a layout: " + ", ".join(LAYOUTS),
        },
    },
}
