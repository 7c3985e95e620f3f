"""Beam deals images out as it likes; the summaries are the same."""

import json
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from jaxdiff.evaluation.accumulators import Moments, Sample
from pipelines.combiners import all_counts, all_moments, one_sample

SHARDS, SHARD, WIDTH, SIZE = 60, 16, 8, 100
WORKERS = 3  # each of which gets bundles of its own


@pytest.fixture(scope="module")
def shards() -> list[tuple[list[str], np.ndarray]]:
    """Keys and features of each."""
    random = np.random.default_rng(0)
    return [
        (
            [f"{SHARD * shard + row:09d}" for row in range(SHARD)],
            random.standard_normal((SHARD, WIDTH)) + 100,
        )
        for shard in range(SHARDS)
    ]


class Summarize(beam.DoFn):
    def start_bundle(self):
        self.is_first = True

    def process(self, shard):
        keys, features = shard
        counts = {"bundles": int(self.is_first), "images": len(keys)}
        self.is_first = False
        yield Moments.of(features), Sample.of(keys, features, SIZE), counts


def write(summary: tuple, directory: Path) -> None:
    moments, sample, counts = summary
    np.savez(directory / "summary.npz", **moments.arrays(), **sample.arrays())
    (directory / "counts.json").write_text(json.dumps(counts))


def test_all_bundles_together_make_one_summary(shards, tmp_path):
    options = PipelineOptions([], direct_num_workers=WORKERS, direct_running_mode="multi_threading")
    combine = beam.combiners.TupleCombineFn(all_moments, one_sample, all_counts)
    with beam.Pipeline(FnApiRunner(), options) as pipeline:
        (
            pipeline
            | beam.Create(shards)
            | beam.Reshuffle()
            | beam.ParDo(Summarize())
            | beam.CombineGlobally(combine)
            | beam.Map(write, tmp_path)
        )
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["bundles"] > 1
    assert counts["images"] == SHARDS * SHARD

    keys = [key for part, _ in shards for key in part]
    features = np.concatenate([part for _, part in shards])
    drawn, expected = Sample.of(keys, features, SIZE), Moments.of(features)
    with np.load(tmp_path / "summary.npz") as arrays:
        sample, moments = Sample.from_arrays(arrays), Moments.from_arrays(arrays)
    assert sample.hashes.tobytes() == drawn.hashes.tobytes()
    assert sample.features.tobytes() == drawn.features.tobytes()
    assert moments.count == expected.count
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-12)
    error = np.abs(moments.scatter - expected.scatter).max()
    assert error <= 1e-12 * np.abs(expected.scatter).max()


def test_no_images_have_a_summary_too():
    assert all_moments([]).count == 0
    assert len(one_sample([]).features) == 0
    assert all_counts([]) == {}
