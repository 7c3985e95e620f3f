"""tools/bench: the calculation of its figures, and a small run of both engines."""

import json

import numpy as np
import pytest

from tools.bench import __main__ as bench
from tools.bench import report, workload
from tools.bench.engine import Column, Engine, EngineError, failure_of
from tools.bench.measure import Figure, Plan
from tools.bench.workload import Workload

OURS, THEIRS = Column("jaxdiff", "float32"), Column("diffusers", "float32")
HALF = Column("diffusers", "bfloat16")
PLAN = Plan([OURS, THEIRS, HALF], [1], rounds=3, one_at_a_time=False, job_images=8)


def make_figure(ours, theirs, **more):
    return Figure("step", 1, "s", rounds={OURS: ours, THEIRS: theirs}, **more)


def test_ratios_are_computed_per_round():
    figure = make_figure([1.0, 4.0, 3.0], [2.0, 2.0, 4.0])
    assert report.ratios(figure, OURS, THEIRS) == [0.5, 2.0, 0.75]


def test_the_peak_is_that_of_the_faster_engine_in_the_same_dtype():
    product = Figure("product", 1, "s", rounds={OURS: [2.0, 8.0, 4.0], THEIRS: [5.0], HALF: [1.0]})
    product.operations = 100
    peaks = report.peaks([product])
    assert peaks == {"float32": 25.0, "bfloat16": 100.0}
    assert report.share_of_peak(make_figure([8.0], [16.0], operations=100), OURS, peaks) == 0.5


def test_the_table_gives_the_reason_for_a_missing_figure():
    figure = make_figure([1.0], [2.0], failures={HALF: "out of memory"})
    *_, row = report.as_markdown([figure], PLAN).splitlines()
    assert row == "| step | 1 | s | 1 | 2 | out of memory | **0.50** (0.50 to 0.50) |  |"


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 9 GiB."),
    ],
)  # fmt: skip
def test_out_of_memory_errors_of_every_engine_are_recognised(problem):
    assert failure_of(problem) == "out of memory"


def test_no_two_images_have_the_same_prompt():
    prompts = workload.prompts(0, 8) + workload.prompts(8, 8)
    assert len(set(prompts)) == 16


def test_the_error_of_an_engine_that_cannot_start_gives_the_reason(tmp_path):
    work = Workload(str(tmp_path / "missing"), 64, 64, 2, 3.0, 1, 0.0, 0.9, "off")
    with pytest.raises(EngineError, match="missing"):
        Engine(OURS, "step", 1, work)


@pytest.mark.slow
def test_both_engines_compute_the_same(tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("diffusers")
    output, markdown = tmp_path / "bench.json", tmp_path / "bench.md"
    arguments = ["--model", tiny_checkpoint, "--parts", "images", "--batch", "2", "--rounds", "2"]
    arguments += ["--steps", "2", "--batches-a-turn", "1", "--turn-seconds", "0"]
    arguments += ["--output", output, "--markdown", markdown]
    assert bench.main([*map(str, arguments)]) == 0
    (figure,) = json.loads(output.read_text())["figures"]
    rounds = [np.array(column["rounds"]) for column in figure["columns"].values()]
    assert [column.shape for column in rounds] == [(2,), (2,)]
    compared = figure["ratios"]["diffusers float32"]
    assert compared["difference of outputs"] < 0.01  # for pixels from 0 to 255
    np.testing.assert_allclose(compared["rounds"], rounds[0] / rounds[1])
    assert markdown.read_text() == capsys.readouterr().out


def test_a_missing_model_gives_a_one_line_error(capsys):
    assert bench.main(["--model", "/nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
