"""The metrics, plots and TensorBoard files of a run, read back."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from small_runs import RECIPE, task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxdiff.training import loop, tensorboard, watch

pytestmark = pytest.mark.usefixtures("compiled_faster")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    loop.fit(task(), RECIPE, output)
    return output


def events(output) -> EventAccumulator:
    read = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    read.Reload()
    return read


def test_a_line_is_written_at_first_steps_and_with_every_checkpoint(run):
    lines = watch.read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in lines if "validation_loss" in line] == [20, 40, 60]
    for line in lines:
        assert line["gradient_norm"] > 0
        assert line["images_per_second"] > 0
        assert np.mean(line["loss_by_noise_level"]) == pytest.approx(line["loss"])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["learning_rate"] == pytest.approx(1e-3)


def test_tensorboard_has_the_same_numbers_and_the_sample_grids(run):
    read = events(run)
    for line in watch.read_metrics(run / "metrics.jsonl"):
        for name in {"loss", "validation_loss", "learning_rate"} & line.keys():
            (value,) = (found.value for found in read.Scalars(name) if found.step == line["step"])
            assert value == pytest.approx(line[name])
    grids = read.Images("samples")
    assert [grid.step for grid in grids] == [20, 40, 60]
    assert (grids[-1].height, grids[-1].width) == (48, 48)
    assert grids[-1].encoded_image_string == (run / "samples" / "000060.png").read_bytes()


def test_tensorboard_drops_repeated_steps(tmp_path):
    first = tensorboard.begin(tmp_path, 0)
    for step in (10, 20, 30):
        tensorboard.append_scalars(first, step, {"loss": float(step)})
    again = tensorboard.begin(tmp_path, 20)
    tensorboard.append_scalars(again, 30, {"loss": 31.0})
    read = EventAccumulator(str(tmp_path)).Reload()
    values = [(found.step, found.value) for found in read.Scalars("loss")]
    assert values == [(10, 10.0), (20, 20.0), (30, 31.0)]


def test_the_plots_and_grids_are_images(run):
    for name in ("loss.png", "noise_levels.png", "samples/000040.png"):
        with Image.open(run / name) as picture:
            picture.load()


def test_without_a_terminal_progress_is_in_plain_lines(tmp_path, capsys):
    loop.fit(task(), replace(RECIPE, steps=40), tmp_path)
    said = capsys.readouterr().err
    assert "\r" not in said
    validated = r", validation loss [\d.]+, images per second [\d.e+]+$"
    for step, rest in ((1, ""), (20, validated), (40, validated)):
        assert re.search(rf"^jaxdiff: step {step}/40: loss [\d.]+{rest}", said, re.M)


def test_the_axis_of_the_loss_has_plain_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for losses in ([1.8, 1.7, 1.6], [3.0, 0.1, 0.002]):
        lines = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
        watch.draw_loss(lines, tmp_path / "loss.png")
        (axes,) = drawn.pop().axes
        low, high = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert len(ticks) >= 3
        for tick in ticks:
            assert axes.yaxis.get_major_formatter()(tick) == f"{tick:g}"
        smooth = axes.lines[1].get_ydata()
        assert smooth.tolist() == pytest.approx([np.mean(losses[: n + 1]) for n in range(3)])


def test_levels_without_images_have_no_loss():
    window = [{"loss": 1.0, "by_noise_level": [[2.0, 0.0], [1.0, 0.0]]}]
    window += [{"loss": 3.0, "by_noise_level": [[4.0, 0.0], [2.0, 0.0]]}]
    line = watch.means(window)
    assert line == {"loss": 2.0, "loss_by_noise_level": [2.0, None]}


def test_the_plot_of_noise_levels_supports_gaps_and_a_single_line(tmp_path):
    line = {"step": 50, "loss_by_noise_level": [1.0, None, 0.5]}
    watch.draw_noise_levels([line], tmp_path / "one.png")
    watch.draw_noise_levels([line, line | {"step": 100}], tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_on_resuming_later_lines_and_a_broken_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps({"step": step, "loss": 1.0}) for step in (50, 100, 150)]
    path.write_text("\n".join(texts) + '\n{"step": 200, "lo')
    watch.Watch(tmp_path, 100, 1000, []).progress.close()
    assert [line["step"] for line in watch.read_metrics(path)] == [50, 100]


def test_a_task_without_noise_levels_has_no_plot_of_them(tmp_path):
    silent = task()
    silent = replace(silent, loss=lambda *given: (task().loss(*given)[0], {}))
    loop.fit(silent, replace(RECIPE, steps=2), tmp_path)
    assert (tmp_path / "loss.png").exists()
    assert not (tmp_path / "noise_levels.png").exists()
