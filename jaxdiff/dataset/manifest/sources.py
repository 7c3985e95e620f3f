"""Opens the images that rows name and pins them by their hashes."""

import functools
import hashlib
import itertools
import os
from dataclasses import replace
from typing import NamedTuple

from jaxdiff.checks import BadValueError
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.images import loading, sources
from jaxdiff.request import Request, Source

REMEMBERED = 2**16  # sources, so that memory does not grow with the manifest


def root_of(manifest: Manifest) -> str:
    """Returns the folder, or its URL, that contains all files of a manifest."""
    names = [source.name for source in manifest.sources]
    places = [name if "://" in name else os.path.abspath(name) for name in names]
    folders = [place.split("/")[:-1] for place in places]
    parts = zip(min(folders), max(folders), strict=False)  # what these share, all share
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], parts)
    return "/".join(part for part, _ in shared) or "/"


class _Opened(NamedTuple):
    sha256: str
    size: tuple[int, int]  # height and width
    is_black: bool


class Sources:
    """The images of a manifest. Each is opened once, unless it is named again much later.

    Attributes:
      root: what addresses are relative to, a folder or URL.
    """

    def __init__(self, root: str):
        """Prepares to open images whose addresses are relative to `root`."""
        self.root = root
        self._opened = functools.lru_cache(maxsize=REMEMBERED)(self._open)

    def pinned(self, request: Request) -> Request:
        """Returns a request with a `Source` for each address of an image.

        Raises:
          BadValueError: if an image cannot be used, or a mask does not fit its image.
        """
        for name in ("control_image", "ip_adapter_image"):
            if getattr(request, name) is not None:
                seen = [self._source(said, is_mask=False) for said in getattr(request, name)]
                pinned = tuple(Source(address, opened.sha256) for address, opened in seen)
                request = replace(request, **{name: pinned})
        if request.image is None:
            return request
        loading.inner_size(request)  # which checks the borders
        address, opened = self._source(request.image, is_mask=False)
        image, mask = Source(address, opened.sha256), None
        if request.mask_image is not None:
            address, mask_opened = self._source(request.mask_image, is_mask=True)
            loading.check_mask(mask_opened.size, opened.size, mask_opened.is_black)
            mask = Source(address, mask_opened.sha256)
        return replace(request, image=image, mask_image=mask)

    def size(self, request: Request) -> tuple[int, int]:
        """Returns the height and width in pixels of a request's image; raises BadValueError."""
        return self._source(request.image, is_mask=False)[1].size

    def _source(self, said: str, *, is_mask: bool) -> tuple[str, _Opened]:
        address = sources.address(said, self.root)
        opened = self._opened(address, is_mask)
        if isinstance(opened, str):
            raise BadValueError(opened)
        return address, opened

    def _open(self, address: str, is_mask: bool) -> _Opened | str:
        """Returns what is remembered of an image, or why it cannot be used."""
        try:
            content = sources.read(address, self.root)
            pixels = (sources.mask if is_mask else sources.opened)(content, f"image {address}")
        except BadValueError as problem:
            return str(problem)
        is_black = is_mask and not (pixels >= 128).any()
        return _Opened(hashlib.sha256(content).hexdigest(), pixels.shape[:2], is_black)
