"""The command line of `jaxdiff upscale`, which is `generate` with images for prompts. No Beam."""

from pathlib import Path

from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.errors import InputError
from pipelines import generate_options
from pipelines.command_line import Parser
from pipelines.generate_options import Job

USAGE = "jaxdiff upscale INPUT --model MODEL --output DIR [option ...]"
DESCRIPTION = """\
Enlarge images with an upscaler, and write a finished dataset to a directory. If it is interrupted,
run the same command again to continue.

INPUT is a folder of images, a quoted glob, a dataset that jaxdiff made, a folder of WebDataset
shards, or a manifest with the column `image`: a .jsonl, .json, .csv, .tsv or .parquet file.
"""
EPILOG = """\
options:
  --model MODEL   shapes64-x4, the bundled upscaler of small drawings; a .safetensors file of
                  Real-ESRGAN or ESRGAN (RRDBNet, or the compact SRVGGNetCompact); or a diffusers
                  directory of Stable Diffusion's x4 or latent x2 upscaler
  --output DIR    the dataset's directory, or its s3://, gs:// or az:// address

Large images are enlarged in tiles of 288x288 pixels that overlap by 32, so any size fits in memory;
the result has at most 8192 pixels on a side. All other options are those of `jaxdiff generate`,
such as --image-format, --limit, --workers and --dtype; so are the exit codes.

example:
  jaxdiff generate --manifest prompts.txt --output out/small
  jaxdiff upscale out/small --model shapes64-x4 --output out/large
"""


def parse(arguments: list[str]) -> tuple[Job, list[str]]:
    """Reads the command line; returns what `generate_options.parse` does.

    Raises:
      InputError: as `generate_options.parse` does, or if the input is missing or a folder of
        prompts, or the model cannot be opened or enlarges no images.
    """
    parser = Parser("upscale", DESCRIPTION, usage=USAGE, epilog=EPILOG, add_help=False)
    if {"-h", "--help"} & {*arguments}:
        parser.print_help()
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        parser.error(f"the input is missing, which comes first: {USAGE}")
    if len(arguments) > 1 and not arguments[1].startswith("-"):
        parser.error(
            f"unexpected {arguments[1]!r}: the input is one name; put quotes around a glob"
        )
    job, rest = generate_options.parse(["--manifest", *arguments])
    if not any(word.partition("=")[0] == "--model" for word in arguments):
        parser.missing("--model", rest)
    if job.models.open().enlarges is None:
        raise InputError(
            f"--model {job.models.model} enlarges no images; use an upscaler, such as shapes64-x4"
        )
    if Path(job.manifest).is_dir() and manifests.find(job.manifest).sources[0].is_item:
        raise InputError(
            f"{job.manifest} has .txt files, which are read as prompts; name its images, in "
            f"quotes: '{job.manifest}/*.png'"
        )
    return job, rest
