"""The options of `jaxdiff encode`. Does not import Beam."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command_line import Parser
from pipelines.generate_options import Models


@dataclass(frozen=True)
class Encoding:
    """A parsed command.

    Attributes:
      data: a folder of captioned images, in a layout that `open_examples` reads.
      captions: the column of captions; "" to detect it.
      model: as for `jaxdiff generate --model`.
      output: the folder to write.
      size, aspect_ratios: as in `recipe.Data`; a size of 0 means the model's.
      embeddings: whether to encode the captions too.
      images_per_shard: the maximum number.
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
    """Reads the command line; returns the job and the remaining arguments for Beam.

    Raises:
      InputError: for an option that cannot be used.
    """
    parser = Parser(
        "encode",
        description="Encode captioned images to a model's latents once, so that training does not "
        "encode them at every step. Set data.path in a recipe to the output directory. Exit codes: "
        "0 success; 1 failed part-way, run the same command to continue; 2 the command or its "
        "input cannot be used; 75 stopped by a signal, run the same command to continue.",
        epilog="example:\n  jaxdiff encode --data photos --model shapes64 --output out/encoded\n\n"
        "Options not listed here are passed to Apache Beam.",
    )
    parser.add_argument("--data", metavar="DIR", required=True, help="the images (docs/data.md)")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="a new directory or one to continue"
    )
    parser.add_argument(
        "--model", metavar="MODEL", default="shapes64", help="as for jaxdiff generate --model"
    )
    parser.add_argument(
        "--captions",
        metavar="COLUMN",
        default="",
        help="the captions' column (default: detected)",
    )
    parser.add_argument(
        "--size",
        metavar="PX",
        type=int,
        default=0,
        help="images are scaled to the area of a PX x PX square (default: the model's size)",
    )
    parser.add_argument(
        "--aspect-ratios",
        metavar="RATIO",
        type=float,
        default=1.0,
        help="widest aspect ratio; its inverse is the tallest (default: 1, squares only)",
    )
    parser.add_argument("--embed", action="store_true", help="also encode the captions")
    parser.add_argument(
        "--images-per-shard",
        metavar="N",
        type=int,
        default=1000,
        help="maximum images per shard (default: 1000)",
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
