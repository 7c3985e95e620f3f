"""A finished image."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image as pillow

from jaxdiff import checks
from jaxdiff.errors import InputError
from jaxdiff.images import decoding, image_files
from jaxdiff.request import SOURCES, Request, to_columns

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}  # by the name's ending


@dataclass(frozen=True, eq=False, repr=False)
class Image:
    """A finished image, which notebooks show.

    Attributes:
      pixels: uint8 [height, width, 3], sRGB; of an enlarged image with transparency, [..., 4].
      request: the request, with every default filled in.
      finite: False if the network's values overflowed, which makes the pixels meaningless.
    """

    pixels: np.ndarray
    request: Request
    finite: bool

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        said = f"{width}x{height}, {checks.shown(self.request.prompt)}, seed={self.request.seed}"
        return f"<Image {said}{'' if self.finite else ', not finite'}>"

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.pil().save(file, "png")
        return file.getvalue()

    def pil(self) -> pillow.Image:
        """Returns the image for Pillow, RGB or RGBA."""
        return pillow.fromarray(self.pixels)

    def save(self, path: str | Path) -> None:
        """Writes the image to a file, its settings in the metadata, as `jaxdiff generate` does.

        Args:
          path: ends in .png, .webp (lossless), .jpg or .jpeg (quality 95, on white).

        Raises:
          InputError: for another ending.
          OSError: if the file cannot be written.
        """
        image_format = FORMATS.get(Path(path).suffix.lower())
        if image_format is None:
            raise InputError(f"{path}: the name must end in one of {', '.join(FORMATS)}")
        pixels = self.pixels
        if pixels.shape[-1] == 4 and image_format not in image_files.LOSSLESS:
            pixels = decoding.rgb(self.pil(), "image")
        Path(path).write_bytes(image_files.encode(pixels, self._settings(), image_format))

    def _settings(self) -> dict:
        """Returns the request's texts and numbers, by column."""
        plain = replace(self.request, **dict.fromkeys(SOURCES))
        columns = to_columns([plain])
        settings = {name: said for name, (said,) in columns.items() if said is not None}
        if self.request.image is not None:  # the file says that it was made of another image
            settings["init_image"] = "given as pixels"
        return settings
