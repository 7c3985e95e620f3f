"""Turns a manifest's rows into planned images. Imports no JAX.

A row that cannot be used is listed with the reason; the others go on.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, lru_cache, partial

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.dataset.manifest import columns, rows
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.dataset.manifest.notices import Notices
from jaxdiff.dataset.manifest.readers import Entry
from jaxdiff.dataset.manifest.sources import Sources
from jaxdiff.dataset.plan import PlannedImage
from jaxdiff.dataset.settings import Settings
from jaxdiff.diffusion import scheduler_config
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from jaxdiff.images import loading
from jaxdiff.request import LATER_COLUMNS, SOURCES, Request, derived_seed, field_checks

MAX_IMAGES = 10**9  # keys have 9 digits
MIN_TORCH_VALUES = 16  # per image; PyTorch draws fewer values with another algorithm
# Rows whose tokens are counted at once: their characters and images, which take memory.
BATCH_SIZE = 2**16
MAX_REJECTED = 1_000_000  # rows; a manifest with more is another kind of file


def image_digest(image: PlannedImage) -> bytes:
    """Returns the digest of an image's record without its key; valid in this process only."""
    decides = (image.id, image.image_index, image.request, image.metadata)
    return hashlib.blake2b(repr(decides).encode(), digest_size=16).digest()


class PlanReader:
    """Turns a manifest into planned images and lists the rows that it rejects."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        model: Ensemble,
        rejected,
        known: dict,
        sources: Sources,
    ):
        self.manifest, self.settings, self.defaults = manifest, settings, model.base.defaults
        self.rejected, self.sources, self.takes_images = rejected, sources, False
        self.later_columns: set[str] = set()
        self.with_images = partial(model.with_images, strength=settings.strength)
        self.why_not_without_images = lru_cache(maxsize=256)(self._why_not_without_images)
        self.known, self.next_key = known, len(known)
        defaults = model.base.defaults
        self.enlarges = model.enlarges
        sides = defaults.size_multiple, defaults.largest_side
        checked = field_checks(*sides, model.samplers)
        self.parser = rows.RowParser(settings, checked, needs_prompt=self.enlarges is None)
        self.schedulers = model.schedulers(settings.scheduler)
        self.why_not = cache(partial(_why_not, schedulers=self.schedulers, eta=settings.eta))
        self.lost_tokens = model.lost_tokens(settings.prompt_chunks)
        self.notices = Notices(settings.prompt_column, model.base.defaults.guidance)
        self.samplers: set[str] = set()
        self.counts = {"blank": 0, "rejected": 0, "accepted": 0}
        self.first_reason = ""
        self.problem: InputError | None = None
        self.place_of_id: dict[str, tuple[str, int]] = {}
        self.prompt_of_item: dict[str, str] = {}  # of manifests with one row per question

    def images(self) -> Iterator[PlannedImage]:
        """Yields the images of the first `limit` that are not planned yet, in manifest order."""
        index = 0
        limit = self.settings.limit or MAX_IMAGES + 1
        for row, lost in self._counted_rows():
            for image_index in range(min(row.num_images, limit - index)):
                image = self._planned(row, image_index, lost)
                if not self.known or not self._is_known(image):
                    yield image
                    self.next_key += 1
                index += 1
            if index > MAX_IMAGES:
                raise InputError(
                    f"manifest {self.manifest.name} asks for more than {MAX_IMAGES} images"
                )
            if index == limit:
                return

    def _planned(self, row: rows.Row, image_index: int, lost: int) -> PlannedImage:
        request = row.request
        if image_index:
            if row.seeds is None:
                seed = derived_seed(self.settings.seed, row.id, image_index)
            else:
                seed = row.seeds[image_index]
            request = Request.of_checked(vars(request) | {"seed": seed})
        key = f"{self.next_key:09d}"
        return PlannedImage(key, row.id, image_index, request, row.metadata, *row.place, lost)

    def _is_known(self, image: PlannedImage) -> bool:
        """Returns whether the extended plan has the image; raises InputError if it differs."""
        digest = self.known.pop((image.id, image.image_index), None)
        if digest not in (None, image_digest(image)):
            raise InputError(
                f"line {image.line} of manifest {image.source} changes image "
                f"{image.image_index} of row {checks.shown(image.id)}, which is already planned"
            )
        return digest is not None

    def _counted_rows(self) -> Iterator[tuple[rows.Row, int]]:
        """Yields accepted rows and their numbers of lost tokens.

        The tokens of a batch are counted while the next one is read.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            before = iter(())
            for batch in self._batches():
                counting = pool.submit(self.lost_tokens, _prompts(batch))
                yield from before
                before = self._with_lost_tokens(batch, counting)
            yield from before
        if self.problem is not None:
            raise self.problem

    def _with_lost_tokens(
        self, batch: list[rows.Row], counting: Future[dict[str, int]]
    ) -> Iterator[tuple[rows.Row, int]]:
        counts = counting.result()
        for row in batch:
            lost = counts[row.request.prompt] + counts[row.request.negative_prompt]
            if lost:
                self.notices.add_cut(row.place, lost)
            yield row, lost

    def _batches(self) -> Iterator[list[rows.Row]]:
        """Yields accepted rows in batches; an error is kept until all rows before it are used."""
        batch, size = [], 0
        try:
            for row in self._rows():
                batch.append(row)
                size += row.num_images + len(row.metadata)
                size += len(row.request.prompt) + len(row.request.negative_prompt)
                if size >= BATCH_SIZE:
                    yield batch
                    batch, size = [], 0
        except InputError as problem:
            self.problem = problem
        yield batch

    def _rows(self) -> Iterator[rows.Row]:
        """Yields the accepted rows of the first `limit` images."""
        number, images = -1, 0
        for source in self.manifest.sources:
            # A name might not be UTF-8.
            name = os.fsencode(source.name).decode("utf-8", "backslashreplace")
            arguments = source, self.settings.prompt_column, self.sources.root
            for entry in manifests.read(*arguments):
                if entry.values is None and entry.error is None:
                    self.counts["blank"] += 1
                    continue
                number += 1
                place = (name, entry.line)
                try:
                    row = self._accept(entry, place, number)
                except BadValueError as problem:
                    self._reject(entry, place, str(problem))
                else:
                    self.counts["blank" if row is None else "accepted"] += 1
                    if row is not None:
                        self.notices.add(place, entry.values, row.request)
                        images += row.num_images
                        yield row
                        if self.settings.limit and images >= self.settings.limit:
                            return

    def _accept(self, entry: Entry, place: tuple[str, int], number: int) -> rows.Row | None:
        """Returns the row, or None if it repeats the item of an accepted row."""
        if entry.error is not None:
            raise BadValueError(entry.error)
        row = self.parser.parse(entry.values, number, place)
        request = row.request
        if not request.has_images:
            shared = request.width, request.height, request.steps, request.sampler
            if reason := self.why_not_without_images(*shared):
                raise BadValueError(reason)
        else:
            request = self._completed(request)
            row = row._replace(request=request)
            if any(getattr(request, name) is not None for name in SOURCES):
                self.takes_images = True
            has = (name for name in LATER_COLUMNS if getattr(request, name) is not None)
            self.later_columns.update(has)
        first = self.place_of_id.setdefault(row.id, place)
        if columns.has_repeated_items(entry.values):
            said = self.prompt_of_item.setdefault(row.id, request.prompt)
            if first is not place and said == request.prompt:
                return None
        if first is not place:
            raise BadValueError(self._why_not_again(row.id, number, first, place))
        return row

    def _why_not_without_images(self, width: int, height: int, steps: int, sampler: str) -> str:
        """Returns why no row without images can have these values, or "" if it can."""
        values = {"width": width, "height": height, "steps": steps, "sampler": sampler}
        try:
            self._completed(Request(prompt="", **values))
        except BadValueError as problem:
            return str(problem)
        return ""

    def _completed(self, request: Request) -> Request:
        """Returns a request with all values of its images; raises BadValueError."""
        if self.enlarges is not None:
            request = self._sized(request)
        self._check_size(request)
        self.samplers.add(request.sampler)
        if reason := self.why_not(request.sampler, request.steps):
            raise BadValueError(reason)
        return self.sources.pinned(self.with_images(request))

    def _why_not_again(self, row_id: str, number: int, first: tuple, place: tuple) -> str:
        is_number = " (the row's number from 0, which is its default id)"
        which = checks.shown(row_id) + (is_number if row_id == str(number) else "")
        where = f" of {first[0]}" if first[0] != place[0] else ""
        return f"id {which} is already used on line {first[1]}{where}"

    def _sized(self, request: Request) -> Request:
        """Returns a request with the size of its image, enlarged."""
        if request.image is None:  # which `with_images` rejects
            return request
        size = self.sources.size(request)
        multiple = self.defaults.size_multiple
        sides = loading.enlarged_size(*size, self.enlarges, multiple)
        for name, side in zip(("height", "width"), sides, strict=True):
            most = self.defaults.largest_side
            if side > most:
                raise BadValueError(
                    f"image is {size[1]}x{size[0]}: enlarged by {self.enlarges}, its {name} would "
                    f"be {side} px, more than {most}; make it smaller"
                )
        return replace(request, height=sides[0], width=sides[1])

    def _check_size(self, request: Request) -> None:
        latents_px = request.width * request.height // self.defaults.factor**2
        values = latents_px * self.defaults.latent_channels
        if self.settings.noise == "torch" and values < MIN_TORCH_VALUES:
            raise BadValueError(
                f"{request.width}x{request.height} has {values} latent values; --noise torch needs "
                f"at least {MIN_TORCH_VALUES}: make it larger"
            )

    def _reject(self, entry: Entry, place: tuple[str, int], reason: str) -> None:
        source, line = place
        self.counts["rejected"] += 1
        if not self.first_reason:
            where = f"{source}, " if len(self.manifest.sources) > 1 else ""
            self.first_reason = f"{where}line {line}: {reason}"
        record = {"file": source, "line": line, "reason": reason, "raw": entry.raw}
        self.rejected.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.counts["rejected"] > MAX_REJECTED:
            raise InputError(
                f"manifest {self.manifest.name} has more than {MAX_REJECTED} rows that cannot be "
                f"used; {self.first_reason}"
            )

    def why_nothing(self) -> str:
        """Returns the error message for a manifest of which nothing can be planned."""
        if self.counts["rejected"]:
            return (
                f"manifest {self.manifest.name}: none of its {self.counts['rejected']} rows can be "
                f"used; {self.first_reason}"
            )
        return f"manifest {self.manifest.name} has no rows"


def _prompts(batch: list[rows.Row]) -> set[str]:
    requests = [row.request for row in batch]
    return {text for each in requests for text in (each.prompt, each.negative_prompt)}


def _why_not(sampler: str, steps: int, **model) -> str:
    """Returns the error message of `check_steps`, or ""; unlike an error, it can be cached."""
    try:
        scheduler_config.check_steps(sampler, steps, **model)
    except BadValueError as problem:
        return str(problem)
    return ""
