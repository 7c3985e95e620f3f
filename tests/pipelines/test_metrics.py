"""Beam's metrics equal the sums of the done-markers, as the report does."""

import json

from apache_beam.metrics import MetricsFilter
from injected import in_noise_at

from jaxdiff import cli
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from pipelines import generate


def counters(result) -> dict[str, int]:
    found = result.metrics().query(MetricsFilter().with_namespace("jaxdiff"))["counters"]
    return {counter.key.metric.name: counter.committed for counter in found}


def test_the_counters_of_a_job_are_the_sums_of_its_markers(tmp_path, command, monkeypatch, noisy):
    directory, results, make_shards = tmp_path / "out", [], generate.make_shards
    monkeypatch.setattr(generate, "make_shards", lambda *job: results.append(make_shards(*job)))
    noisy(in_noise_at("star", 'raise RuntimeError("no stars")'))
    assert cli.main(command(directory, "--workers=2")) == 3

    report = json.loads((directory / "run.json").read_text())
    counted = counters(results[0])
    assert (counted["images"], counted["failed"], counted["rejected"]) == (21, 3, 1)
    assert (report["counts"]["made"], report["counts"]["failed"]) == (21, 3)
    assert report["counts"]["rejected"] == 1
    assert counted["padded"] == report["padded"] > 0
    stages = {name: value for name, value in counted.items() if name.endswith("_ms")}
    seconds = {name: report["seconds"][name.removesuffix("_ms")] for name in stages}
    assert set(stages) == {f"{s}_ms" for s in ("load", "compile", "generate", "encode", "write")}
    assert stages == {name: round(1000 * value) for name, value in seconds.items()}

    run = open_run(directory)
    markers = [shards.read_marker(run, shard) for shard in range(6)]
    assert counted["images"] == sum(marker.made for marker in markers)
    assert counted["failed"] == sum(marker.failed for marker in markers)
    assert counted["padded"] == sum(marker.facts["padded"] for marker in markers)
