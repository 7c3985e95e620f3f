"""Makes the images of one shard: batches on the device, encoding on threads, files in an attempt.

If the model fails on a batch, the guilty images are found by halving it (the compiled batch size
stays the same), so only they fail. An image fails too if its values are not finite. Neither is held
against an image if an empty prompt fails in the same way: then the model is broken.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from jaxdiff.checks import BadValueError
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.plan import Plan, PlannedImage
from jaxdiff.errors import InputError
from jaxdiff.images import loading
from jaxdiff.request import Bucket, Request
from pipelines.jobs import StoppedError
from pipelines.profiling import Profile

if TYPE_CHECKING:
    from jaxdiff.engine.engine import TextToImage
    from jaxdiff.engine.image import Image

ENCODING_THREADS = READING_THREADS = min(4, os.cpu_count() or 1)
NOT_FINITE = "the model's values were not finite"
MAX_REASON_CHARACTERS = 300
NOTHING = {"prompt": "", "negative_prompt": "", "seed": 0}  # what any working model can make
# The buckets in which this process has seen a model make an empty prompt's image of finite values.
_sound: WeakKeyDictionary["TextToImage", set[Bucket]] = WeakKeyDictionary()


def device_of(model: "TextToImage") -> str:
    """Returns the name of a model's devices, such as "4 x NVIDIA H200"."""
    devices = model.mesh.devices
    return f"{devices.size} x {devices.flat[0].device_kind}"


class ShardImages:
    """Generates, encodes, stores and counts the images of a shard.

    Args:
      batch_size: images computed at once on each device.
      alone: the keys of images to compute in batches of their own, padded with copies.
      deadly: the keys of images to skip, each with the reason.
      tell: called with {"running": [key, ...]} whenever the images being computed change.
      is_stopping: returns whether to give up.
      profile: notified of every batch.

    Attributes:
      made, failed, padded: the numbers of images made, of images failed, and of padded batch slots.
    """

    def __init__(
        self,
        model: "TextToImage",
        plan: Plan,
        batch_size: int,
        *,
        alone: Iterable[str] = (),
        deadly: dict[str, str] | None = None,
        tell: Callable[[dict], None],
        is_stopping: Callable[[], bool],
        profile: Profile,
    ):
        from jaxdiff.devices import programs  # imports JAX

        self._model, self._plan, self._tell = model, plan, tell
        self._alone, self._deadly = set(alone), deadly or {}
        self._is_stopping, self._profile = is_stopping, profile
        self._batch_size = batch_size
        self._running: dict[str, PlannedImage] = {}
        self._unreadable: dict[str, str] = {}  # why an image that a row names cannot be used
        self._waited, self._waited_before = programs.seconds_waited, programs.seconds_waited()
        self._encode_seconds = 0.0
        self._write_seconds = 0.0
        self.made = self.failed = self.padded = 0

    def fill(
        self,
        attempt: shards.Attempt,
        planned: list[PlannedImage],
        kept: set[str],
        made: Iterator[Sample],
    ) -> None:
        """Adds all images to the attempt.

        Args:
          kept: the keys of the images that exist already; `made` yields them in order.

        Raises:
          StoppedError: if `is_stopping` returns true.
          InputError: if the model fails on every image, makes none of finite values, or runs out of
            memory.
        """
        wanted = [i for i in planned if i.key not in kept and i.key not in self._deadly]
        with ThreadPoolExecutor(ENCODING_THREADS) as pool:
            depth = 2 * self._model.slots(planned[0].request, self._batch_size)
            samples = _ahead(self._encode, self._fairly_judged(wanted), pool, depth)
            for image in planned:
                if self._is_stopping():
                    raise StoppedError
                if image.key in kept:
                    result = next(made)
                elif image.key in self._deadly:
                    result = self._deadly[image.key]
                else:
                    result, seconds = next(samples)
                    self._encode_seconds += seconds
                    self.made += isinstance(result, Sample)
                began = time.monotonic()
                if isinstance(result, Sample):
                    attempt.add(result)
                else:
                    attempt.add_failed(image, result)
                    self.failed += 1
                self._write_seconds += time.monotonic() - began

    def seconds(self, all_seconds: float) -> dict[str, float]:
        """Returns the seconds per stage; encoding overlaps with generating."""
        compiling = self._waited() - self._waited_before
        generating = all_seconds - compiling - self._write_seconds
        return {
            "compile": compiling,
            "generate": generating,
            "encode": self._encode_seconds,
            "write": self._write_seconds,
        }

    def _fairly_judged(
        self, planned: list[PlannedImage]
    ) -> Iterator[tuple[PlannedImage, "Image | str"]]:
        """Yields as `_images` does, but raises InputError if the model makes no finite values."""
        for image, made in self._images(planned):
            if not isinstance(made, str) and not made.finite:
                self._check_sound(image)
            yield image, made

    def _images(self, planned: list[PlannedImage]) -> Iterator[tuple[PlannedImage, "Image | str"]]:
        """Yields each image with its pixels, or with the reason for its failure, in order."""
        if self._alone:
            self._works(planned[0])  # if the process dies here, no row is to blame
        rest, most = deque(planned), len(planned)
        if planned and self._model.encodes_ahead:
            most = self._model.prompts_at_once(planned[0].request, self._batch_size)
        while rest:
            together = [rest.popleft()]
            if together[0].key in self._alone:
                yield from self._made_alone(together)
                continue
            while rest and rest[0].key not in self._alone and len(together) < most:
                together.append(rest.popleft())
            made = 0
            try:
                for pair in self._stream(together):
                    yield pair
                    made += 1
            except Exception as problem:
                if _is_fatal(problem):
                    raise self._explained(problem, together[0]) from problem
                suspects = together[made : made + len(self._running)]
                rest.extendleft(reversed(together[made + len(suspects) :]))
                yield from self._made_alone(suspects)

    def _made_alone(
        self, planned: list[PlannedImage]
    ) -> Iterator[tuple[PlannedImage, "Image | str"]]:
        """Yields as `_images` does, but isolates failing images by halving the batch."""
        try:
            yield from list(self._stream(planned))
        except Exception as problem:
            if _is_fatal(problem):
                raise self._explained(problem, planned[0]) from problem
            if len(planned) > 1:
                middle = len(planned) // 2
                yield from self._made_alone(planned[:middle])
                yield from self._made_alone(planned[middle:])
                return
            if not self._works(planned[0]):
                raise InputError(
                    f"the model fails on every image: {reason_of(problem)}"
                ) from problem
            yield planned[0], reason_of(problem)

    def _stream(self, planned: list[PlannedImage]) -> Iterator[tuple[PlannedImage, "Image"]]:
        """Yields images as the model makes them, and reports which are being computed."""
        self._running = {}
        if self._model.encodes_ahead:
            self._encode_prompts(planned)
        requests = self._announced(planned)
        images = self._model.stream_bucket(requests, self._batch_size)
        for image, made in zip(planned, images, strict=True):
            del self._running[image.key]
            yield image, self._unreadable.get(image.key, made)
        self._tell({"running": []})

    def _encode_prompts(self, planned: list[PlannedImage]) -> None:
        """Encodes the prompts of all images before the first is made."""
        self._tell({"running": [image.key for image in planned]})  # one of them might kill it
        requests = [image.request for image in planned]
        try:
            # The model may be asked for an image of an empty prompt while others are made.
            self._model.encode_prompts([replace(requests[0], **NOTHING), *requests])
        except Exception as problem:
            if _is_fatal(problem):
                raise
            # The batch with the guilty prompt will fail, too.

    def _announced(self, planned: list[PlannedImage]) -> Iterator:
        """Yields the images' requests, and announces each batch before its first request."""
        slots = self._model.slots(planned[0].request, self._batch_size)
        with ThreadPoolExecutor(READING_THREADS) as pool:
            requests = _ahead(self._prepared, planned, pool, 2 * slots)
            for start in range(0, len(planned), slots):
                if self._is_stopping():
                    raise StoppedError
                batch = planned[start : start + slots]
                self.padded += slots - len(batch)
                self._running |= {image.key: image for image in batch}
                self._tell({"running": [*self._running]})
                self._profile.batch(only=len(planned) <= slots)
                yield from itertools.islice(requests, len(batch))

    def _prepared(self, image: PlannedImage) -> Request:
        """Returns an image's request with what it names read, or something else in its place."""
        try:
            settings = self._plan.settings
            return loading.prepared(
                image.request,
                self._plan.image_root,
                settings.preprocess,
                self._model.prompt_sizes,
                self._model.enlarges,
            )
        except BadValueError as problem:
            self._unreadable[image.key] = str(problem)
            return self._blank(image.request)

    def _blank(self, request: Request) -> Request:
        """Returns a request of the same bucket with grey in the place of its images, if any."""
        return loading.blank(request, self._model.prompt_sizes, self._model.enlarges)

    def _works(self, image: PlannedImage) -> bool:
        """Returns whether the model can make an image of an empty prompt, in its own size."""
        width, height = self._model.checkpoint.defaults.size
        plain = replace(image.request, **NOTHING, width=width, height=height)
        plain = self._blank(plain)
        try:
            list(self._model.stream_bucket([plain], self._batch_size))
        except Exception:
            return False
        return True

    def _check_sound(self, image: PlannedImage) -> None:
        """Raises InputError unless the model makes finite values of an empty prompt, too.

        It is asked once per bucket: size, sampler and steps may all make the values overflow.
        """
        sound = _sound.setdefault(self._model, set())
        if image.request.bucket in sound:
            return
        try:
            nothing = replace(image.request, **NOTHING)
            nothing = self._blank(nothing)
            (plain,) = self._model.stream_bucket([nothing], self._batch_size)
        except Exception as problem:
            if _is_fatal(problem):
                raise self._explained(problem, image) from problem
            raise InputError(f"the model fails on every image: {reason_of(problem)}") from problem
        if not plain.finite:
            dtype = self._plan.settings.dtype
            better = "another model" if dtype == "float32" else "--dtype float32"
            raise InputError(
                f"the model's values for an empty prompt of {image.request.width}x"
                f"{image.request.height} are not finite in {dtype}, so no row is to blame; start "
                f"over in another directory with {better}"
            )
        sound.add(image.request.bucket)

    def _explained(self, problem: Exception, image: PlannedImage) -> Exception:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            return problem
        slots = self._model.slots(image.request, self._batch_size)
        size = f"{image.request.width}x{image.request.height}"
        less = "a smaller --batch-size" if self._batch_size > 1 else "bfloat16 or smaller images"
        on_cpu = self._model.mesh.devices.flat[0].platform == "cpu"
        if self._plan.settings.text_encoders == "device" and not on_cpu:
            less += ", or --text-encoders unload"
        return InputError(
            f"a batch of {slots} images of {size} does not fit in the memory of "
            f"{device_of(self._model)}; free some memory, or start over in another directory with "
            f"{less}"
        )

    def _encode(self, pair: tuple[PlannedImage, "Image | str"]) -> tuple[Sample | str, float]:
        """Returns an image's stored form or the reason for its failure, and the seconds taken."""
        planned, image = pair
        if isinstance(image, str):
            return image, 0.0
        if not image.finite:
            return NOT_FINITE, 0.0
        began = time.monotonic()
        return shards.encode(planned, image.pixels, self._plan), time.monotonic() - began


def _is_fatal(problem: Exception) -> bool:
    """Returns whether the cause cannot be a single row."""
    return isinstance(
        problem, StoppedError | InputError | OSError | MemoryError
    ) or "RESOURCE_EXHAUSTED" in str(problem)


def reason_of(problem: Exception) -> str:
    """Returns the error as one short line."""
    first, *_ = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {first}"[:MAX_REASON_CHARACTERS]


def _ahead(function: Callable, items: Iterable, pool: ThreadPoolExecutor, depth: int) -> Iterator:
    """Maps in the pool, keeping the order, at most `depth` items ahead of the consumer."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
