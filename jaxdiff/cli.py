"""The `jaxdiff` command. Imports a subcommand's modules only when it runs, so help is instant."""
# PYTHON_ARGCOMPLETE_OK

import sys
from collections.abc import Callable
from pathlib import Path

import jaxdiff
from jaxdiff import checks
from jaxdiff.errors import InputError, suggestion
from pipelines import command_line, completion
from pipelines.command_line import Parser

OVERVIEW = """\
usage: jaxdiff COMMAND [option ...]

Prompt manifests in, verifiable image datasets out: batch text-to-image generation in JAX.

commands:
  generate   generate an image for each prompt
  compile    compile a job's programs ahead of time, for machines that start without compiling
  upscale    enlarge the images of a folder or of a dataset
  inspect    show what a model contains, and whether it can be used
  verify     check, from its files alone, that a dataset is complete and unchanged
  view       write a gallery of a dataset: web pages that need no server
  sign       add a C2PA manifest (Content Credentials) to every image of a dataset
  train      train a model from a recipe
  encode     encode images to latents once, before training
  evaluate   evaluate models on a prompt benchmark, and write a report

to get started:
  jaxdiff generate --prompt "a red circle above a blue square" --output out/first

`jaxdiff COMMAND --help` lists a command's options. Every command takes --debug, which shows
tracebacks and the libraries' own messages. `jaxdiff --version` prints the version. For completion
with the Tab key, add to ~/.bashrc or ~/.zshrc: eval "$(register-python-argcomplete jaxdiff)"
"""
SHOWN_PROBLEMS = 20
DATASET = "the dataset's directory, or its s3://, gs:// or az:// address"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code. An error is printed as one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if completion.is_asked():
        name = completion.command(_commands())
        arguments = ["generate" if name == "upscale" else name]  # which has the same options
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"jaxdiff {jaxdiff.__version__}")
        return 0
    return command_line.run(lambda said: _command(said[0])(said[1:]), arguments)


def _command(name: str) -> Callable[[list[str]], int]:
    commands = _commands()
    if name not in commands:
        hint = suggestion(name, commands) or f"; the commands are {', '.join(commands)}"
        raise InputError(f"unknown command {name!r}{hint}")
    return commands[name]


def _commands() -> dict[str, Callable[[list[str]], int]]:
    return {
        "generate": _generate,
        "compile": _compile,
        "upscale": _upscale,
        "inspect": _inspect,
        "verify": _verify,
        "view": _view,
        "sign": _sign,
        "train": _train,
        "encode": _encode,
        "evaluate": _evaluate,
    }


def _generate(arguments: list[str]) -> int:
    from pipelines import generate_options

    job, beam_arguments = generate_options.parse(arguments)
    from pipelines import generate

    return generate.run(job, beam_arguments)


def _compile(arguments: list[str]) -> int:
    from pipelines import compile_options

    job, beam_arguments = compile_options.parse(arguments)
    from pipelines import compile_job

    return compile_job.run(job, beam_arguments)


def _upscale(arguments: list[str]) -> int:
    from pipelines import upscale_options

    job, beam_arguments = upscale_options.parse(arguments)
    from pipelines import generate

    return generate.run(job, beam_arguments)


def _inspect(arguments: list[str]) -> int:
    parser = Parser(
        "inspect",
        description="Show what a model contains: its family, its networks, its default settings, "
        "and the fingerprint that identifies it in datasets.",
    )
    parser.add_argument("model", metavar="MODEL", help="as for jaxdiff generate --model")
    parser.add_argument("--base", metavar="MODEL", help="as for jaxdiff generate --base")
    parser.add_argument("--variant", metavar="NAME", help="a variant of its files, such as fp16")
    said = parser.parse_args(arguments)
    from jaxdiff.families import inspect, open_checkpoint

    print(inspect.report(open_checkpoint(said.model, said.variant, said.base)))
    return 0


def _verify(arguments: list[str]) -> int:
    parser = Parser(
        "verify",
        description="Check a finished dataset from its files alone: every planned image must be "
        "accounted for; every file must be what _SUCCESS records, every record what was planned "
        "and, in lossless formats, every pixel what the record says; and no file may be added. "
        "Names that begin with a dot and gallery/ are left alone. With options of Apache Beam "
        "(--runner, ...), a Beam job checks the shards. Exit codes: 0 everything is "
        "correct; 1 something is wrong; 2 there is nothing to check, or what a repair needs is "
        "damaged, as the plan; 75 a repair or a Beam job was stopped.",
    )
    parser.add_argument("directory", metavar="DIR", help=DATASET)
    parser.add_argument("--repair", action="store_true", help="remake what is wrong, byte for byte")
    said, beam_arguments = parser.parse_known_args(arguments)
    directory = said.directory
    if beam_arguments and not beam_arguments[0].startswith("-"):
        parser.error(f"unexpected {beam_arguments[0]!r}")
    if said.repair:
        if beam_arguments:
            parser.error(f"--repair works on this machine only, without {beam_arguments[0]}")
        from pipelines.repair import repair

        if not repair(directory):
            return 75
    from pipelines import jobs

    if beam_arguments:
        from pipelines import verify

        try:
            counts, problems = verify.verify(directory, beam_arguments)
        except jobs.StoppedError:
            print("jaxdiff: stopped; run the same command to begin again", file=sys.stderr)
            return 75
    else:
        from jaxdiff.dataset import ledger

        counts, problems = ledger.verify(directory)
    for problem in problems[:SHOWN_PROBLEMS]:
        print(checks.printable(problem))
    if problems:
        what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"{directory}: {what}", file=sys.stderr)
        return 1
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    made = f"images: {counts['made']} of {counts['planned']} made{failed}"
    print(f"{directory} is complete: {jobs.rows(counts)}; {made}")
    return 0


def _view(arguments: list[str]) -> int:
    parser = Parser(
        "view",
        description="Write a gallery of a dataset, finished or not: thumbnails, search, and each "
        "image with its settings and the command that reproduces it. It opens in any browser, "
        "needs no server and no network, and replaces an existing gallery.",
    )
    parser.add_argument("directory", metavar="DIR", help=DATASET)
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="the gallery's folder (default: DIR/gallery)"
    )
    parser.add_argument(
        "--sheet",
        metavar="FILE.png",
        type=Path,
        help="write no gallery, but the first 64 images with their prompts as one picture",
    )
    said = parser.parse_args(arguments)
    from jaxdiff.dataset.finished import contact_sheet, gallery

    if said.sheet and said.output:
        parser.error("--sheet names a file, --output a gallery's folder; use one of them")
    if said.sheet:
        print(contact_sheet.write(said.directory, said.sheet))
        return 0
    print(gallery.write(said.directory, said.output))
    return 0


def _sign(arguments: list[str]) -> int:
    parser = Parser(
        "sign",
        description="Add a C2PA manifest (Content Credentials) to every image of a finished "
        "dataset. It states that jaxdiff made the image with a trained model, and is signed with "
        "your certificate. Pixels and settings stay the same. Signed images are skipped: if "
        "interrupted, run the same command again. No network is used, not even for a timestamp, so "
        "the signatures are valid only as long as the certificate is.",
        epilog="example:\n  pip install jaxdiff[c2pa]\n"
        "  jaxdiff sign out/first --certificate chain.pem --key key.pem",
    )
    parser.add_argument("directory", metavar="DIR", help=DATASET)
    parser.add_argument(
        "--certificate",
        metavar="CHAIN.pem",
        type=Path,
        required=True,
        help="your certificate, followed by its issuers' certificates",
    )
    parser.add_argument(
        "--key", metavar="KEY.pem", type=Path, required=True, help="its private key, unencrypted"
    )
    said = parser.parse_args(arguments)
    from jaxdiff.dataset.finished import signing

    signed = signing.sign_dataset(said.directory, said.certificate, said.key)
    what = f"signed {signed} images" if signed else "every image is already signed"
    print(f"{said.directory}: {what}")
    return 0


def _train(arguments: list[str]) -> int:
    parser = Parser(
        "train",
        description="Train a model from a recipe, or continue an interrupted training. Exit codes: "
        "0 finished; 1 failed, or the loss was not a number (the last checkpoint is kept); 2 the "
        "recipe or the directory cannot be used; 75 stopped by SIGTERM after saving everything, "
        "run the same command to continue.",
        epilog="example:\n  jaxdiff train configs/train/shapes64.toml --output runs/shapes64\n"
        "  jaxdiff train configs/train/shapes64.toml --output runs/shapes64 --export best",
    )
    parser.add_argument("recipe", metavar="RECIPE.toml", type=Path, help="what to train and how")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="directory for all results"
    )
    parser.add_argument(
        "--export",
        metavar="WHICH",
        help="do not train; write the model of a checkpoint: best (by validation loss), last, or "
        "a step number",
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="with --export: the directory for the model (default: OUTPUT/model-STEP)",
    )
    said = parser.parse_args(arguments)
    if said.to and not said.export:
        raise InputError("--to works only with --export; use --output for a training's directory")
    from jaxdiff.training import loop, train
    from pipelines.class_images import class_images

    if said.export:
        print(train.export(said.recipe, said.output, said.export, said.to, class_images))
        return 0
    try:
        finished = train.train(said.recipe, said.output, class_images)
    except loop.Interrupted as problem:
        print(f"jaxdiff: {problem}", file=sys.stderr)
        return 1
    if not finished:
        print(f"jaxdiff: stopped; run the same command to continue {said.output}", file=sys.stderr)
        return 75
    print(train.summary(said.recipe, said.output))
    return 0


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
