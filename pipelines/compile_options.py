"""The command line of `jaxdiff compile`, which is that of `generate`. Does not import Beam."""

from jaxdiff.dataset.store import is_address
from jaxdiff.errors import InputError
from pipelines import generate_options
from pipelines.command_line import Parser
from pipelines.generate_options import Job

USAGE = "jaxdiff compile [JOB.toml] --manifest FILE --output DIR [option ...]"
DESCRIPTION = """\
Compile a job's programs ahead of time, for machines that start to generate without compiling.

Give it all options of the job. It plans the manifest, generates nothing, and writes the programs of
every kind of image in it to a directory, from which jaxdiff generate reads them if the environment
variable JAX_COMPILATION_CACHE_DIR names it. Large models compile for many minutes.
"""
EPILOG = """\
options:
  --output DIR     the directory of programs: a new one, or one to add to. Only you may be able to
                   write to it: who can change a program can run code where it is used
  --target SLICE   compile for this TPU slice, such as tpu-v5e:2x2, which need not be here (default:
                   for the devices of this machine)

All other options are those of `jaxdiff generate`; whatever changes the programs must be as for the
job: the model, --dtype, --mesh, --batch-size, sizes, steps. See docs/tpu.md.

example:
  jaxdiff compile --manifest prompts.txt --output programs
  JAX_COMPILATION_CACHE_DIR=programs jaxdiff generate --manifest prompts.txt --output out/first

exit codes: 0 success; 1 failed part-way; 2 the command or its input cannot be used, or a program
does not fit
"""


def parse(arguments: list[str]) -> tuple[Job, list[str]]:
    """Reads the command line; returns what `generate_options.parse` does.

    Raises:
      InputError: as `generate_options.parse` does, or if `--output` is missing on the command line
        or no local directory.
    """
    parser = Parser("compile", DESCRIPTION, usage=USAGE, epilog=EPILOG, add_help=False)
    if {"-h", "--help"} & {*arguments}:
        parser.print_help()
        raise SystemExit(0)
    if {"--dry-run", "--dry_run"} & {*arguments}:
        parser.error("--dry-run belongs to jaxdiff generate, which then tells what fits")
    job, rest = generate_options.parse([*arguments, "--dry-run"])  # with which --target goes
    if not any(word.partition("=")[0] == "--output" for word in arguments):
        parser.missing("--output", rest, "; a job file's is for the dataset")
    if is_address(job.output):
        raise InputError(f"--output {job.output}: name a local directory, and copy it there after")
    return job, rest
