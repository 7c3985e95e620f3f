"""The command line. What a command needs is imported when it runs, so that help comes at once."""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

from jaxdiff.errors import InputError
from pipelines import command_line
from pipelines.command_line import Parser

OVERVIEW = """\
usage: jaxdiff COMMAND [option ...]

Prompt manifests in, verifiable image datasets out: batch text-to-image generation in JAX.

commands:
  generate   make an image for every prompt of a manifest
  inspect    say what is in a model, and whether it can be used
  verify     prove from its files that a dataset is complete and unchanged
  view       write a gallery of a dataset: pages for a browser, without a server
  sign       add a C2PA manifest (Content Credentials) to every image of a dataset
  train      train a model from a recipe
  encode     encode images to latents once, before a training
  evaluate   judge models over a prompt benchmark, and write a report

start with:
  echo "a red circle above a blue square" > prompts.txt
  jaxdiff generate --manifest prompts.txt --output out/first

`jaxdiff COMMAND --help` lists a command's options. Every command takes --debug, which shows
tracebacks and the libraries' own messages. `jaxdiff --version` says which version this is.
"""
SHOWN_PROBLEMS = 20


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code. Mistakes are told on one line of stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"jaxdiff {_version()}")
        return 0
    return command_line.run(lambda said: _command(said[0])(said[1:]), arguments)


def _version() -> str:
    try:
        return importlib.metadata.version("jaxdiff")
    except importlib.metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


def _command(name: str) -> Callable[[list[str]], int]:
    commands = {
        "generate": _generate,
        "inspect": _inspect,
        "verify": _verify,
        "view": _view,
        "sign": _sign,
        "train": _train,
        "encode": _encode,
        "evaluate": _evaluate,
    }
    if name not in commands:
        raise InputError(f"unknown command {name!r}; the commands are {', '.join(commands)}")
    return commands[name]


def _generate(arguments: list[str]) -> int:
    from pipelines import generate_options

    job, beam_arguments = generate_options.parse(arguments)
    from pipelines import generate

    return generate.run(job, beam_arguments)


def _inspect(arguments: list[str]) -> int:
    parser = Parser(
        "inspect",
        description="Say what is in a model: its family, its networks, what it prefers, and the "
        "fingerprint that datasets name it by.",
    )
    parser.add_argument("model", metavar="MODEL", help="as for jaxdiff generate --model")
    parser.add_argument("--variant", metavar="NAME", help="which of its files, such as fp16")
    said = parser.parse_args(arguments)
    from jaxdiff.families import inspect, open_checkpoint

    print(inspect.report(open_checkpoint(said.model, said.variant)))
    return 0


def _verify(arguments: list[str]) -> int:
    parser = Parser(
        "verify",
        description="Check a finished dataset from its files alone: that every planned image is "
        "accounted for, and every file, every record and, in lossless formats, every pixel is as "
        "it was made. Exit codes: 0 all is right; 1 something is wrong; 2 there is nothing to "
        "check, or its plan is damaged; 75 a repair was stopped.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the dataset's directory")
    parser.add_argument(
        "--repair", action="store_true", help="make what is wrong again, to the same bytes"
    )
    said = parser.parse_args(arguments)
    directory = said.directory
    from jaxdiff.dataset import ledger

    if said.repair:
        from pipelines.repair import repair

        if not repair(directory):
            return 75
    counts, problems = ledger.verify(directory)
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem)
    if problems:
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"{directory}: {what}", file=sys.stderr)
        return 1
    print(f"{directory} is complete: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return 0


def _view(arguments: list[str]) -> int:
    parser = Parser(
        "view",
        description="Write a gallery of a dataset, finished or not: thumbnails, search, and each "
        "image with its settings and the command that makes it again. It opens in any browser, "
        "needs no server and no network, and replaces the gallery that is there.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the dataset's directory")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="the gallery's folder (default: DIR/gallery)"
    )
    said = parser.parse_args(arguments)
    from jaxdiff.dataset.finished import gallery

    print(gallery.write(said.directory, said.output))
    return 0


def _sign(arguments: list[str]) -> int:
    parser = Parser(
        "sign",
        description="Add a C2PA manifest (Content Credentials) to every image of a finished "
        "dataset: that jaxdiff made it, with a trained model, signed with your certificate. Pixels "
        "and settings stay as they are. What is signed already is left alone, so an interrupted "
        "signing goes on. Nothing is asked of the network, a timestamp neither: the signatures "
        "count while the certificate is in force.",
        epilog="example:\n  pip install jaxdiff[c2pa]\n"
        "  jaxdiff sign out/first --certificate chain.pem --key key.pem",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the dataset's directory")
    parser.add_argument(
        "--certificate",
        metavar="CHAIN.pem",
        type=Path,
        required=True,
        help="your certificate, then those of its issuers",
    )
    parser.add_argument(
        "--key", metavar="KEY.pem", type=Path, required=True, help="its private key, not encrypted"
    )
    said = parser.parse_args(arguments)
    from jaxdiff.dataset.finished import signing

    signed = signing.sign_dataset(said.directory, said.certificate, said.key)
    what = f"signed {signed} images" if signed else "every image is signed already"
    print(f"{said.directory}: {what}")
    return 0


def _train(arguments: list[str]) -> int:
    parser = Parser(
        "train",
        description="Train a model from a recipe, or continue a training that was interrupted. "
        "Exit codes: 0 it is finished; 1 it failed or its loss was no number, and the last "
        "checkpoint is kept; 2 the recipe or the directory cannot be used; 75 SIGTERM came, all is "
        "saved, and the same command continues.",
        epilog="example:\n  jaxdiff train configs/train/shapes64.toml --output runs/shapes64\n"
        "  jaxdiff train configs/train/shapes64.toml --output runs/shapes64 --export best",
    )
    parser.add_argument("recipe", metavar="RECIPE.toml", type=Path, help="what to train, and how")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="for all it makes"
    )
    parser.add_argument(
        "--export",
        metavar="WHICH",
        help="train nothing; write the model of a checkpoint: best (by validation loss), last, or "
        "its step's number",
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="with --export: the model's directory (default: OUTPUT/model-STEP)",
    )
    said = parser.parse_args(arguments)
    if said.to and not said.export:
        raise InputError("--to: is for --export; --output says where a training goes")
    from jaxdiff.training import loop, run
    from pipelines.class_images import class_images

    if said.export:
        print(run.export(said.recipe, said.output, said.export, said.to, class_images))
        return 0
    try:
        return 0 if run.train(said.recipe, said.output, class_images) else 75
    except loop.Interrupted as problem:
        print(f"jaxdiff: {problem}", file=sys.stderr)
        return 1


def _encode(arguments: list[str]) -> int:
    from pipelines import encode_options

    encoding, beam_arguments = encode_options.parse(arguments)
    from pipelines import encode

    return encode.run(encoding, beam_arguments)


def _evaluate(arguments: list[str]) -> int:
    from pipelines import evaluate_options

    asked, beam_arguments = evaluate_options.parse(arguments)
    from pipelines import evaluate

    return evaluate.run(asked, beam_arguments)
