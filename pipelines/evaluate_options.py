"""What `jaxdiff evaluate` can be told. Imports neither Beam nor JAX."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from jaxdiff.dataset import settings
from jaxdiff.errors import InputError
from jaxdiff.evaluation.benchmarks import BENCHMARKS
from jaxdiff.evaluation.layouts.folders import LAYOUTS
from pipelines import generate_options
from pipelines.command_line import Parser
from pipelines.generate_options import Job

DESCRIPTION = """\
Judge models over a prompt benchmark: make the images (or take those that are there), measure them,
and write a report with confidence intervals. Several models or settings give one comparison, pair
by pair at equal seeds. When it is interrupted, the same command continues where it was.
"""
EPILOG = """\
examples:
  jaxdiff evaluate --benchmark shapes --model shapes64 --output out/judged
  jaxdiff evaluate --benchmark shapes --model A --model B --vary steps=10,20 --output out/compared
  jaxdiff evaluate --benchmark geneval --prompts evaluation_metadata.jsonl --model M --output out/g
  jaxdiff evaluate --export geneval --dataset out/first --output out/for-geneval

Options that are not listed here go to jaxdiff generate (--steps, --seed, --batch-size, ...) and to
Apache Beam (--runner, ...).

exit codes: 0 judged; 1 failed part-way, the same command continues; 2 the command or its input
cannot be used; 3 judged, but some images could not be made; 75 stopped by a signal, the same
command continues
"""
REFEREES = {"best:clip": "clip_score", "best:shapes": "correct"}


@dataclass(frozen=True)
class Run:
    """One column of the comparison.

    Attributes:
      name: tells it from the others, and names its folder.
      job: makes its images; None where they are there already.
      images: the dataset's directory, or that of a layout.
    """

    name: str
    job: Job | None
    images: Path


@dataclass(frozen=True)
class Evaluation:
    """A parsed command.

    Attributes:
      benchmark, prompts: as in `benchmarks.read`; per_tag and prompts_seed too.
      images: of each prompt.
      output: the directory of the report.
      runs: what is compared, the first with each of the others.
      is_layout: whether the runs' images lie in the benchmark's layout, not in a dataset.
      clip: the directory of CLIP's weights, or "".
      reference: a folder of images or an .npz of features, that the images should be like; or "".
      training: a folder of images that they should not be copies of; or "".
      keep: the measure by which the best image of each prompt is kept; or "".
    """

    benchmark: str
    prompts: Path | None
    per_tag: int
    prompts_seed: int
    images: int
    output: Path
    runs: tuple[Run, ...]
    is_layout: bool = False
    clip: str = ""
    reference: str = ""
    training: str = ""
    keep: str = ""


@dataclass(frozen=True)
class Export:
    """A dataset to be written in a benchmark's layout."""

    layout: str
    dataset: Path
    output: Path


def parse(arguments: list[str]) -> tuple[Evaluation | Export, list[str]]:
    """Reads the command line.

    Returns:
      what is to be done, and the arguments that are left for Beam.

    Raises:
      InputError: for options that are missing, unknown, or do not go together.
    """
    parser = _parser()
    said, rest = parser.parse_known_args(arguments)
    if not said.output:
        parser.missing("--output", rest)
    if said.export:
        if not said.dataset:
            parser.error("--export needs --dataset, whose images it writes in that layout")
        if rest or said.benchmark:
            parser.error(f"--export goes with --dataset and --output alone, not {rest or '...'}")
        return Export(said.export, said.dataset, said.output), []
    if not said.benchmark:
        parser.missing("--benchmark", rest, f"; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[said.benchmark]
    given = said.dataset or said.layout
    if given and (said.model or said.vary):
        parser.error("--model and --vary are for making images; --dataset and --layout have theirs")
    if said.dataset and said.layout:
        parser.error("--dataset and --layout both name the images; say one")
    if given:
        runs, beam_arguments = (Run(given.name, None, given),), rest
    else:
        runs, beam_arguments = _runs(said, rest)
    evaluation = Evaluation(
        benchmark=said.benchmark,
        prompts=said.prompts,
        per_tag=said.per_tag,
        prompts_seed=said.prompts_seed,
        images=said.images or benchmark.images,
        output=said.output,
        runs=runs,
        is_layout=said.layout is not None,
        clip=said.clip,
        reference=said.reference,
        training=said.training,
        keep=REFEREES.get(said.keep, ""),
    )
    if evaluation.keep == "clip_score" and not said.clip:
        parser.error("--keep best:clip needs --clip, a directory of CLIP's weights")
    if evaluation.keep == "correct" and said.benchmark != "shapes":
        parser.error("--keep best:shapes needs --benchmark shapes")
    return evaluation, beam_arguments


def _runs(said, rest: list[str]) -> tuple[tuple[Run, ...], list[str]]:
    """A run for each model and each combination of what varies."""
    models = said.model or ["shapes64"]
    varied = [_varied(text) for text in said.vary]
    runs, beam_arguments = [], []
    for model, *chosen in itertools.product(models, *varied):
        words = [word for name, value in chosen for word in (f"--{name}", value)]
        manifest = said.output / "manifest.jsonl"
        common = ["--manifest", str(manifest), "--output", str(said.output), "--model", model]
        job, beam_arguments = generate_options.parse([*rest, *words, *common])
        name = " ".join([Path(model).name, *(f"{name}={value}" for name, value in chosen)])
        runs.append(Run(name, job, said.output))
    names = [run.name for run in runs]
    for position, run in enumerate(runs):
        earlier = names[:position].count(run.name)
        name = f"{run.name} ({earlier + 1})" if earlier else run.name
        folder = said.output if len(runs) == 1 else said.output / folder_name(name)
        dataset = folder / "dataset"
        runs[position] = Run(name, replace(run.job, output=dataset), dataset)
    return tuple(runs), beam_arguments


def folder_name(name: str) -> str:
    """A run's name as that of a folder."""
    kept = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name)
    return kept.strip("-.") or "run"


def _varied(text: str) -> list[tuple[str, str]]:
    name, equals, values = text.partition("=")
    name = name.replace("_", "-")
    if not equals or not values or name.replace("-", "_") not in settings.NAMES:
        raise InputError(
            f"--vary {text}: say NAME=VALUE,VALUE with an option of jaxdiff generate, such as "
            "steps=10,20"
        )
    return [(name, value) for value in values.split(",")]


def _parser() -> Parser:
    parser = Parser(
        "evaluate",
        usage="jaxdiff evaluate --benchmark NAME --output DIR [option ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    what = parser.add_argument_group("what is judged")
    what.add_argument("--benchmark", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    what.add_argument(
        "--prompts", metavar="FILE", type=Path, help="the benchmark's own file (shapes has one)"
    )
    what.add_argument(
        "--model",
        metavar="MODEL",
        action="append",
        help="as for jaxdiff generate (default: shapes64); may be said again, to compare",
    )
    what.add_argument(
        "--vary",
        metavar="NAME=V,V",
        action="append",
        default=[],
        help="compare values of an option of jaxdiff generate; may be said again",
    )
    what.add_argument(
        "--images", metavar="N", type=_number, help="of each prompt (default: the benchmark's)"
    )
    what.add_argument(
        "--per-tag", metavar="N", type=_number, default=50, help="of shapes' own (default: 50)"
    )
    what.add_argument(
        "--prompts-seed", metavar="N", type=int, default=6, help="draws shapes' own (default: 6)"
    )
    what.add_argument("--dataset", metavar="DIR", type=Path, help="judge its images; make none")
    what.add_argument(
        "--layout", metavar="DIR", type=Path, help="judge images in the benchmark's layout"
    )
    how = parser.add_argument_group("what is measured besides")
    how.add_argument(
        "--clip",
        metavar="DIR",
        default="",
        help="CLIP's weights, a directory of transformers or of OpenCLIP, or a Hub id: CLIPScore, "
        "diversity, labels",
    )
    how.add_argument(
        "--reference",
        metavar="DIR",
        default="",
        help="captioned images, or features (.npz): distances, precision and recall",
    )
    how.add_argument(
        "--training", metavar="DIR", default="", help="captioned images: are there copies of them?"
    )
    where = parser.add_argument_group("what is written")
    where.add_argument("--output", metavar="DIR", type=Path, help="new, or to be continued")
    where.add_argument(
        "--keep",
        choices=REFEREES,
        metavar="best:WHO",
        help="keep each prompt's best image: " + ", ".join(REFEREES),
    )
    where.add_argument(
        "--export",
        choices=LAYOUTS,
        metavar="LAYOUT",
        help="only write --dataset in a layout: " + ", ".join(LAYOUTS),
    )
    return parser


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise InputError(f"{text!r} must be a whole number from 1 to 100000")
    return int(text)
