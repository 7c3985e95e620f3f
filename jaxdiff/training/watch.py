"""Reports on a run: metrics.jsonl, TensorBoard, plots, sample grids and a progress bar."""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxdiff.training import tensorboard

METRICS = "metrics.jsonl"
EARLY_STEPS = 200  # with more lines than later ones
LINE_SECONDS = 30.0  # between lines of progress where there is no terminal
SMOOTHED_LINES = 10  # in about as many lines, the drawn mean forgets what was before
NOISE_LINES = 20  # lines of the metrics averaged into one curve of losses by noise level


class Watch:
    """Collects the metrics of each step; the window is the steps since the last line.

    When a run resumes, lines after the checkpoint are dropped and the window is restored from the
    checkpoint, so the lines match those of an uninterrupted run, except for images per second.
    """

    def __init__(self, output: Path, start: int, steps: int, window: list[dict]):
        self.metrics_path = output / METRICS
        self.lines = [line for line in read_metrics(self.metrics_path) if line["step"] <= start]
        unfinished = self.metrics_path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(unfinished, self.metrics_path)
        self.output = output
        self.events = tensorboard.begin(output / "tensorboard", start)
        self.window = window
        self.images, self.since = 0, time.monotonic()
        # On a terminal, a bar; elsewhere, lines.
        is_shown = sys.stderr is not None and sys.stderr.isatty()
        how = {"unit": "step", "mininterval": 0.5, "disable": not is_shown}
        self.progress = tqdm(initial=start, total=steps, **how)
        self.said = -math.inf

    def add(self, measured: dict, images: int) -> None:
        """Adds the metrics of one step, from `measurements`, and its number of images."""
        self.window.append(measured)
        self.images += images
        self.progress.update()

    def write_line(self, step: int, others: dict[str, float]) -> None:
        """Writes the window's means, `others` and images per second, and starts a new window."""
        rate = self.images / (time.monotonic() - self.since)
        line = {"step": step, **means(self.window), **others, "images_per_second": rate}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        scalars = {name: value for name, value in line.items() if isinstance(value, float)}
        tensorboard.append_scalars(self.events, step, scalars)
        self.lines.append(line)
        self.progress.set_postfix(loss=f"{line['loss']:.4f}", images_per_second=f"{rate:.0f}")
        if self.progress.disable and (others or time.monotonic() >= self.said + LINE_SECONDS):
            self.said = time.monotonic()
            self._say(line)
        self.window = []
        self.begin_window()

    def _say(self, line: dict) -> None:
        """Prints a line of progress."""
        names = ("loss", "validation_loss", "images_per_second")
        known = [f"{name.replace('_', ' ')} {line[name]:.4g}" for name in names if name in line]
        if sys.stderr is not None:  # as in some services
            step = f"jaxdiff: step {line['step']}/{self.progress.total}: "
            print(step + ", ".join(known), file=sys.stderr, flush=True)

    def begin_window(self) -> None:
        """Restarts the clock, so that time not spent on training is excluded."""
        self.images, self.since = 0, time.monotonic()

    def show(self, step: int, samples: np.ndarray) -> None:
        """Writes the sample grid, uint8 [height, width, 3], and redraws the plots."""
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(samples).save(folder / f"{step:06d}.png")
        tensorboard.append_picture(self.events, step, "samples", samples)
        draw_loss(self.lines, self.output / "loss.png")
        if any("loss_by_noise_level" in line for line in self.lines):
            draw_noise_levels(self.lines, self.output / "noise_levels.png")
        self.begin_window()


def is_logged(step: int) -> bool:
    """Returns whether a line is due: at the first step, every 10 steps, and later every 50."""
    return step == 1 or step % (10 if step <= EARLY_STEPS else 50) == 0


def measurements(batches: list[dict], update: dict) -> dict:
    """Moves one step's metrics to the host and averages them over its batches.

    Args:
      batches: the metrics that each batch's loss returned (`loop.Task.loss`), on any device.
      update: scalars of the step as a whole.

    Returns:
      floats by name, and [sums, counts] as "by_noise_level" if it is measured.
    """
    names = [name for name in batches[0] if name != "by_noise_level"]
    measured = {name: float(np.mean([np.float64(b[name]) for b in batches])) for name in names}
    measured |= {name: float(value) for name, value in update.items()}
    if "by_noise_level" in batches[0]:
        measured["by_noise_level"] = sum(np.float64(b["by_noise_level"]) for b in batches).tolist()
    return measured


def means(window: list[dict]) -> dict:
    """Averages `measurements` over a window; a noise level without images has the loss None."""
    names = [name for name in window[0] if name != "by_noise_level"]
    line = {name: sum(measured[name] for measured in window) / len(window) for name in names}
    if "by_noise_level" in window[0]:
        sums, counts = np.sum([measured["by_noise_level"] for measured in window], axis=0)
        line["loss_by_noise_level"] = [
            total / count if count else None for total, count in zip(sums, counts, strict=True)
        ]
    return line


def read_metrics(path: Path) -> list[dict]:
    """Reads a metrics.jsonl; a missing file has no lines, and a truncated line is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the process was killed while writing
            break
    return lines


def draw_loss(lines: list[dict], path: Path) -> None:
    """Plots the losses against the step; the training loss as it is and smoothed."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4))).subplots()
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color="C0", alpha=0.3)
    axes.plot(steps, _smoothed(losses), color="C0", label="training, smoothed")
    measured = [line for line in lines if "validation_loss" in line]
    if measured:
        steps, losses = zip(*((m["step"], m["validation_loss"]) for m in measured), strict=True)
        axes.plot(
            steps, losses, "o-", color="C1", markersize=3, label="validation, averaged weights"
        )
    axes.legend()
    axes.set(title="loss", xlabel="step")
    _log_scale(axes)
    figure.savefig(path, dpi=100)


def _smoothed(losses: list[float]) -> np.ndarray:
    """Returns exponential means, whose first values are plain means."""
    means = np.zeros(len(losses))
    for index, loss in enumerate(losses):
        share = max(1 / (index + 1), 1 / SMOOTHED_LINES)
        means[index] = loss if index == 0 else means[index - 1] + share * (loss - means[index - 1])
    return means


def _log_scale(axes) -> None:
    """Makes the y axis logarithmic, with plain numbers."""
    from matplotlib import ticker

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    is_narrow = high < 10 * low
    axes.yaxis.set_major_locator(
        ticker.MaxNLocator(6) if is_narrow else ticker.LogLocator(subs=(1, 2, 5))
    )
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def draw_noise_levels(lines: list[dict], path: Path) -> None:
    """Plots the loss by noise level for the latest lines and for as many at mid-training."""
    from matplotlib.figure import Figure

    lines = [line for line in lines if "loss_by_noise_level" in line]
    count = min(NOISE_LINES, -(-len(lines) // 2))
    middle = (len(lines) - count) // 2
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    for begin in dict.fromkeys((middle, len(lines) - count)):
        part = lines[begin : begin + count]
        losses = np.array([line["loss_by_noise_level"] for line in part], np.float64)
        known = np.isfinite(losses)
        means = np.where(known, losses, 0).sum(0) / np.maximum(known.sum(0), 1)
        levels = (np.arange(len(means)) + 0.5) / len(means)
        label = f"steps {part[0]['step']} to {part[-1]['step']}"
        axes.plot(levels[known.any(0)], means[known.any(0)], "o-", markersize=3, label=label)
    axes.set(title="loss", xlabel="timestep, scaled to [0, 1] (1 is pure noise)")
    axes.legend()
    _log_scale(axes)
    figure.savefig(path, dpi=100)
