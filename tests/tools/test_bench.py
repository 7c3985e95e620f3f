"""tools/bench: the calculation of its figures, and a small run of both engines."""

import json

import numpy as np
import pytest

from tools.bench import __main__ as bench
from tools.bench import checkpoints, flux_dev, profile, report, workload
from tools.bench.engine import Column, Engine, EngineError, failure_of
from tools.bench.measure import Figure, Plan
from tools.bench.workload import Workload

OURS, THEIRS = Column("jaxdiff", "float32"), Column("diffusers", "float32")
HALF = Column("diffusers", "bfloat16")
SMALL_FLUX = {
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    },
    "text_encoder_2": {"d_ff": 64, "d_kv": 8, "d_model": 32, "num_heads": 4, "num_layers": 2},
    "transformer": {
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 1,
        "num_single_layers": 2,
        "pooled_projection_dim": 32,
    },
    "vae": {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "scheduler": {},
}
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


@pytest.fixture
def small_flux_dev(tmp_path, monkeypatch):
    """A directory as the one that is written for flux1-dev, with smaller networks."""
    configs = {name: flux_dev.CONFIGS[name] | sizes for name, sizes in SMALL_FLUX.items()}
    monkeypatch.setitem(checkpoints.FULL_SIZE, "flux1-dev", (flux_dev.INDEX, configs))
    checkpoints.write("flux1-dev", tmp_path / "flux1-dev")
    return tmp_path / "flux1-dev"


@pytest.mark.slow  # it compiles FLUX.1's structure
def test_the_profile_of_a_step_lists_its_operations(small_flux_dev, tmp_path, capsys):
    arguments = ["--model", small_flux_dev, "--parts", "step", "--batch", "2", "--size", "64"]
    assert profile.main([*map(str, arguments), "--output", str(tmp_path / "trace")]) == 0
    table = (tmp_path / "trace" / "step.md").read_text()
    head, _, everything, *operations = table.splitlines()
    assert head == "| operation | ms | share | calls |"
    count, milliseconds = everything.removeprefix("| all ").split(" | ")[:2]
    assert int(count) >= len(operations) > 5
    assert all(float(row.split(" | ")[1]) <= float(milliseconds) for row in operations)
    assert table in capsys.readouterr().out


@pytest.mark.slow
def test_both_engines_compute_the_same_flux(small_flux_dev, tmp_path):
    pytest.importorskip("diffusers")
    output = tmp_path / "bench.json"
    arguments = ["--model", small_flux_dev, "--parts", "text,step,decode,images", "--batch", "2"]
    arguments += ["--size", "64", "--rounds", "1", "--steps", "2", "--batches-a-turn", "1"]
    arguments += ["--turn-seconds", "0", "--output", output]
    assert bench.main([*map(str, arguments)]) == 0
    compared = [
        figure["ratios"]["diffusers float32"]["difference of outputs"]
        for figure in json.loads(output.read_text())["figures"]
    ]
    assert len(compared) == 4
    assert max(compared) < 0.001


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
