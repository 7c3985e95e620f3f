"""For pipelines of one's own: jaxdiff as a model of Beam's `RunInference`.

    requests | RunInference(TextToImageModelHandler("shapes64", batch_size=8))

`jaxdiff generate` does not use it. What RunInference makes is not stored, not counted and not
resumed: a failed bundle is made again, and nothing tells whether all images are there.
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
_device = threading.Lock()  # a runner's threads share the model and the memory it computes in


@dataclass(frozen=True)
class Failure:
    """Stands where an image would, so that one bad request does not lose its batch.

    Attributes:
      reason: one line for people.
    """

    reason: str


class TextToImageModelHandler(ModelHandler[Request, PredictionResult, "TextToImage"]):
    """Makes a `jaxdiff.engine.engine.Image`, or a `Failure`, of each `jaxdiff.Request`.

    The results are Beam's `PredictionResult`s: the request as it came, the image, and the model's
    fingerprint. Batches have one size: short ones, of which each bundle ends with one, are filled
    with copies, so that nothing is compiled anew. Requests of different sizes, steps or samplers
    are computed apart, each group filled: give a pipeline of mixed sizes several handlers.

    The metrics of RunInference stand in the namespace "jaxdiff", and with them the counters
    `images`, `failed` and `padded_slots`.
    """

    def __init__(self, model: str, *, batch_size: int = 8, **options: Any):
        """Loads nothing yet: a handler is sent to the workers by pickle.

        Args:
          model: as for `jaxdiff.load`, found by the same name on every worker.
          batch_size: requests of a batch; a worker's devices share them.
          **options: as for `jaxdiff.load`.
        """
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._model, self._batch_size, self._options = model, batch_size, options

    def load_model(self) -> "TextToImage":
        """Raises InputError, if the model or an option cannot be used."""
        import jaxdiff

        return jaxdiff.load(self._model, **self._options)

    def run_inference(
        self,
        batch: Sequence[Request],
        model: "TextToImage",
        inference_args: dict[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """Returns a result for each request, in their order."""
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
        """Raises InputError: all that can be said of an image is in its request."""
        if inference_args:
            raise InputError(f"inference_args are not taken: {', '.join(inference_args)}")

    def get_num_bytes(self, batch: Sequence[Request]) -> int:
        """The size of the requests as text, which is about that of their prompts."""
        return sum(len(str(request).encode("utf-8", "surrogatepass")) for request in batch)

    def get_metrics_namespace(self) -> str:
        """Where RunInference's own metrics stand."""
        return NAMESPACE

    def share_model_across_processes(self) -> bool:
        """Never: each process has devices of its own, and an array is not sent between them."""
        return False


def _resolve(model: "TextToImage", request: Request) -> Request | Failure:
    if not isinstance(request, Request):
        return Failure(f"not a jaxdiff.Request but {type(request).__name__}")
    try:
        return model.resolve(request)
    except InputError as problem:
        return Failure(str(problem))


def _count(name: str, number: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(number)
