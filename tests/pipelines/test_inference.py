"""The model handler in Beam's own RunInference, with a real model."""

import shutil
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.ml.inference.base import PredictionResult, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff import Request
from jaxdiff.errors import InputError
from pipelines.inference import Failure, TextToImageModelHandler

ROOT = Path(__file__).parents[2]
BATCH = 4
GOOD = [Request(prompt=f"{n} rings", seed=n, steps=2, guidance_scale=2 + n % 3) for n in range(20)]
BAD = Request(prompt="a ring", width=63, steps=2)
REQUESTS = [*GOOD[:6], BAD, *GOOD[6:]]
THREADS = ("--direct_running_mode=multi_threading", "--direct_num_workers=2")
models, results = [], []  # of the last pipeline in this process


class Watched(TextToImageModelHandler):
    """Keeps its models, so that tests can inspect them."""

    def load_model(self):
        models.append(super().load_model())
        return models[-1]


def keep(result: PredictionResult) -> None:
    results.append(result)


def infer(handler: TextToImageModelHandler, requests: list, *options: str) -> dict[str, int]:
    """Fills `models` and `results`; returns the counters."""
    models.clear()
    results.clear()
    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(options))) as pipeline:
        created = pipeline | beam.Create(requests, reshuffle=bool(options))
        _ = created | RunInference(handler) | beam.Map(keep)
    metrics = pipeline.result.metrics().query(MetricsFilter().with_namespace("jaxdiff"))
    return {counter.key.metric.name: counter.committed for counter in metrics["counters"]}


@pytest.fixture(scope="module")
def inferred(tiny_checkpoint) -> tuple[list[PredictionResult], dict[str, int], jaxdiff.TextToImage]:
    counters = infer(Watched(str(tiny_checkpoint), batch_size=BATCH), REQUESTS)
    (model,) = models
    return list(results), counters, model


def test_images_equal_those_made_without_beam(inferred):
    made, _, model = inferred
    assert [result.example for result in made] == REQUESTS
    expected = iter(model.generate(GOOD, BATCH))
    for result in made:
        if result.example != BAD:
            assert np.array_equal(result.inference.pixels, next(expected).pixels)
            assert result.model_id == model.ensemble.fingerprint


def test_a_bad_request_is_the_only_one_lost(inferred):
    made, _, _ = inferred
    failed = [result for result in made if isinstance(result.inference, Failure)]
    assert [result.example for result in failed] == [BAD]
    assert "width must be a multiple of 8" in failed[0].inference.reason
    assert len(made) - len(failed) == len(GOOD)


def test_all_batches_use_one_program(inferred):
    _, _, model = inferred
    assert len(model._sampler._programs) == 1


def test_everything_is_counted(inferred):
    _, counters, model = inferred
    slots = model.slots(model.resolve(GOOD[0]), BATCH)
    assert counters["num_inferences"] == len(REQUESTS)
    assert (counters["images"], counters["failed"]) == (len(GOOD), 1)
    # Batches of 4, 3, 4, 4, 4 and 1 good requests.
    assert counters["padded_slots"] == sum(-number % slots for number in (4, 3, 4, 4, 4, 1))


@pytest.mark.parametrize("wrong", [None, {"prompt": "a ring"}, BAD])
def test_an_invalid_request_becomes_a_failure(wrong, inferred):
    handler = TextToImageModelHandler("any")
    *_, model = inferred
    (made,) = handler.run_inference([wrong], model)
    assert made.example is wrong
    assert isinstance(made.inference, Failure)
    assert handler.get_num_bytes([wrong]) > 0


def test_threads_share_the_model(tiny_checkpoint, inferred):
    made, *_ = inferred
    infer(Watched(str(tiny_checkpoint), batch_size=BATCH), GOOD, *THREADS)
    assert len(models) == 1
    expected = {result.example.seed: result.inference for result in made if result.example != BAD}
    assert sorted(result.example.seed for result in results) == sorted(expected)
    for result in results:
        pixels = expected[result.example.seed].pixels
        assert np.array_equal(result.inference.pixels, pixels)


def test_values_that_are_not_finite_become_a_failure(tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    (weights,) = (checkpoint / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.weight"][0] = 3e38  # which overflows in a sum
    save_file(tensors, weights)
    counters = infer(TextToImageModelHandler(str(checkpoint), batch_size=2), GOOD[:1])
    assert "not finite" in results[0].inference.reason
    assert (counters["images"], counters["failed"]) == (0, 1)


def test_a_handler_is_small_and_needs_no_jax_until_it_loads():
    script = (
        "import sys; from pipelines.inference import TextToImageModelHandler as Handler\n"
        "import pickle; print(len(pickle.dumps(Handler('shapes64', dtype='bfloat16'))))\n"
        "assert 'jax' not in sys.modules"
    )
    run = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    size = subprocess.run([sys.executable, "-c", script], **run).stdout
    assert int(size) < 1000


def test_inference_args_are_rejected(tiny_checkpoint):
    inference = RunInference(TextToImageModelHandler("shapes64"), inference_args={"steps": 3})
    with pytest.raises(InputError, match=r"inference_args are not supported; .* Request: steps"):
        _ = beam.Pipeline(runner=FnApiRunner()) | beam.Create(GOOD) | inference


def test_beam_gets_batch_sizes_and_hints():
    handler = TextToImageModelHandler("shapes64", batch_size=3)
    sizes = {"min_batch_size": 3, "max_batch_size": 3}
    assert handler.batch_elements_kwargs() == sizes
    assert handler.get_resource_hints() == {}
    assert not handler.share_model_across_processes()
