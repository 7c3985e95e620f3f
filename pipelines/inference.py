"""jaxdiff as a model handler for Beam's `RunInference`, for your own pipelines.

    requests | RunInference(TextToImageModelHandler("shapes64", batch_size=8))

`jaxdiff generate` does not use it. RunInference does not store, account for or resume images: a
failed bundle is made again, and nothing checks that all images exist.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from jaxdiff.errors import InputError
from jaxdiff.request import Request

if TYPE_CHECKING:
    from jaxdiff.engine.engine import TextToImage

NAMESPACE = "jaxdiff"
NOT_FINITE = "the model's values were not finite"
_device = threading.Lock()  # a runner's threads share the model and its device memory


@dataclass(frozen=True)
class Failure:
    """Replaces the image of a bad request, so that the rest of its batch is not lost.

    Attributes:
      reason: one line of text.
    """

    reason: str


class TextToImageModelHandler(ModelHandler[Request, PredictionResult, "TextToImage"]):
    """Generates a `jaxdiff.engine.engine.Image`, or a `Failure`, for each `jaxdiff.Request`.

    The results are Beam's `PredictionResult`s: the unchanged request, the image, and the model's
    fingerprint. All batches have the same size: short ones, such as the last of a bundle, are
    padded with copies, so that nothing is recompiled. Requests of different sizes, steps or
    samplers are computed separately, with each group padded: for mixed sizes, use several handlers.
    Give each request a seed: those without one all get the same.

    RunInference's metrics are in the namespace "jaxdiff", and so are the counters `images`,
    `failed` and `padded_slots`.
    """

    def __init__(self, model: str, *, batch_size: int = 8, **options: Any):
        """Does not load the model: a handler is pickled and sent to the workers.

        Args:
          model: as for `jaxdiff.load`; it must exist under the same name on every worker.
          batch_size: requests per batch; a worker's devices share them.
          **options: as for `jaxdiff.load`.
        """
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._model, self._batch_size, self._options = model, batch_size, options

    def load_model(self) -> "TextToImage":
        """Loads the model; raises InputError if it or an option cannot be used."""
        import jaxdiff

        return jaxdiff.load(self._model, **self._options)

    def run_inference(
        self,
        batch: Sequence[Request],
        model: "TextToImage",
        inference_args: dict[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """Returns a result for each request, in order."""
        found = [_resolve(model, request) for request in batch]
        good = [request for request in found if isinstance(request, Request)]
        on_each = -(-self._batch_size // model.mesh.shape["data"])
        with _device:
            images = iter(model.generate(good, on_each))
        results = [next(images) if isinstance(it, Request) else it for it in found]
        results = [
            it if isinstance(it, Failure) or it.finite else Failure(NOT_FINITE) for it in results
        ]
        failed = sum(isinstance(result, Failure) for result in results)
        groups = Counter(request.bucket for request in good)
        slots = {request.bucket: model.slots(request, on_each) for request in good}
        _count("images", len(batch) - failed)
        _count("failed", failed)
        _count("padded_slots", sum(-number % slots[bucket] for bucket, number in groups.items()))
        fingerprint = model.ensemble.fingerprint
        return [PredictionResult(*pair, fingerprint) for pair in zip(batch, results, strict=True)]

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Raises InputError for any argument: each request holds all options of its image."""
        if inference_args:
            raise InputError(
                "inference_args are not supported; set these options in each Request: "
                f"{', '.join(inference_args)}"
            )

    def get_num_bytes(self, batch: Sequence[Request]) -> int:
        """Returns the size of the requests as text, roughly that of their prompts."""
        return sum(len(str(request).encode("utf-8", "surrogatepass")) for request in batch)

    def get_metrics_namespace(self) -> str:
        """Returns the namespace of RunInference's own metrics."""
        return NAMESPACE

    def share_model_across_processes(self) -> bool:
        """Returns False: each process has its own devices, and arrays are not sent between them."""
        return False


def _resolve(model: "TextToImage", request: Request) -> Request | Failure:
    if not isinstance(request, Request):
        return Failure(f"expected a jaxdiff.Request, not {type(request).__name__}")
    try:
        return model.prepare(request)
    except InputError as problem:
        return Failure(str(problem))


def _count(name: str, number: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(number)
