"""The options of `jaxdiff encode`. Imports no Beam."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command_line import Parser
from pipelines.generate_options import Models


@dataclass(frozen=True)
class Encoding:
    """What is to be encoded.

    Attributes:
      data: a folder of captioned images, in a form that `open_examples` knows.
      captions: the column of captions; "" finds it.
      model: as for `jaxdiff generate --model`.
      output: the folder that is written.
      size, aspect_ratios: as in `recipe.Data`; a size of 0 is the model's.
      embeddings: whether captions are embedded.
      images_per_shard: at most.
    """

    data: str
    model: str
    output: str
    captions: str = ""
    size: int = 0
    aspect_ratios: float = 1.0
    embeddings: bool = False
    images_per_shard: int = 1000


def parse(arguments: list[str]) -> tuple[Encoding, list[str]]:
    """Reads the command line; returns the job and the arguments that are left for Beam.

    Raises:
      InputError: for an option that cannot be used.
    """
    parser = Parser(
        "encode",
        description="Encode captioned images to a model's latents once, so that trainings need not "
        "do it at every step. What is written is named by data.path of a recipe. Exit codes: 0 "
        "done; 1 failed part-way, the same command continues; 2 the command or its input cannot be "
        "used; 75 stopped by a signal, the same command continues.",
        epilog="example:\n  jaxdiff encode --data photos --model shapes64 --output out/encoded\n\n"
        "Options that are not listed here go to Apache Beam.",
    )
    parser.add_argument("--data", metavar="DIR", required=True, help="the images (docs/data.md)")
    parser.add_argument("--output", metavar="DIR", required=True, help="for what is encoded")
    parser.add_argument(
        "--model", metavar="MODEL", default="shapes64", help="as for jaxdiff generate --model"
    )
    parser.add_argument(
        "--captions", metavar="COLUMN", default="", help="of the captions (default: found)"
    )
    parser.add_argument(
        "--size",
        metavar="PX",
        type=int,
        default=0,
        help="side of the square whose area images are brought to (default: the model's)",
    )
    parser.add_argument(
        "--aspect-ratios",
        metavar="RATIO",
        type=float,
        default=1.0,
        help="widest and, inverted, tallest of the images (default: 1, squares)",
    )
    parser.add_argument("--embed", action="store_true", help="encode the captions as well")
    parser.add_argument(
        "--images-per-shard", metavar="N", type=int, default=1000, help="at most (default: 1000)"
    )
    said, beam_arguments = parser.parse_known_args(arguments)
    if beam_arguments and not beam_arguments[0].startswith("-"):
        parser.error(f"unexpected {beam_arguments[0]!r}")
    if said.images_per_shard < 1:
        parser.error("--images-per-shard must be at least 1")
    encoding = Encoding(
        data=str(Path(said.data).absolute()),
        model=Models(said.model).anywhere().model,
        output=str(Path(said.output).absolute()),
        captions=said.captions,
        size=said.size,
        aspect_ratios=said.aspect_ratios,
        embeddings=said.embed,
        images_per_shard=said.images_per_shard,
    )
    return encoding, beam_arguments
