"""What a run shows of itself: metrics.jsonl, TensorBoard, plots, sample grids, a progress line."""

import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxdiff.training import tensorboard

LOG_EVERY = 50
NOISE_LINES = 20  # lines of the metrics that make one curve of the losses by noise level


class Watch:
    """Gathers what each step has measured; the window is the steps since the last line.

    On resuming, lines from after the checkpoint are dropped, and the window is the checkpoint's: so
    the lines are those of a run that was never interrupted, but for the images per second.
    """

    def __init__(self, output: Path, start: int, steps: int, window: list[dict]):
        self.metrics_path = output / "metrics.jsonl"
        self.lines = [line for line in read_metrics(self.metrics_path) if line["step"] <= start]
        unfinished = self.metrics_path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(unfinished, self.metrics_path)
        self.output = output
        self.events = tensorboard.begin(output / "tensorboard", start)
        self.window = window
        self.images, self.since = 0, time.monotonic()
        self.progress = tqdm(initial=start, total=steps, unit="step", mininterval=0.5)

    def add(self, measured: dict, images: int) -> None:
        """Takes in what one step has measured, as `measurements` gives it, on so many images."""
        self.window.append(measured)
        self.images += images
        self.progress.update()

    def write_line(self, step: int, others: dict[str, float]) -> None:
        """Writes the window's means, `others` and the images per second; a new window begins."""
        rate = self.images / (time.monotonic() - self.since)
        line = {"step": step, **means(self.window), **others, "images_per_second": rate}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        scalars = {name: value for name, value in line.items() if isinstance(value, float)}
        tensorboard.append_scalars(self.events, step, scalars)
        self.lines.append(line)
        self.progress.set_postfix(loss=f"{line['loss']:.4f}", images_per_second=f"{rate:.0f}")
        self.window = []
        self.begin_window()

    def begin_window(self) -> None:
        """Starts the clock anew, after what is no training."""
        self.images, self.since = 0, time.monotonic()

    def show(self, step: int, samples: np.ndarray) -> None:
        """Writes the sample grid, uint8 [height, width, 3], and draws the plots anew."""
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(samples).save(folder / f"{step:06d}.png")
        tensorboard.append_picture(self.events, step, "samples", samples)
        draw_loss(self.lines, self.output / "loss.png")
        if any("loss_by_noise_level" in line for line in self.lines):
            draw_noise_levels(self.lines, self.output / "noise_levels.png")
        self.begin_window()


def measurements(batches: list[dict], update: dict) -> dict:
    """One step's metrics, brought to the host: means over its batches.

    Args:
      batches: for each batch what its loss has logged (`loop.Task.loss`), arrays of any device.
      update: scalars of the step as a whole.

    Returns:
      floats by name; and under "by_noise_level", if it is measured, [sums, counts].
    """
    names = [name for name in batches[0] if name != "by_noise_level"]
    measured = {name: float(np.mean([np.float64(b[name]) for b in batches])) for name in names}
    measured |= {name: float(value) for name, value in update.items()}
    if "by_noise_level" in batches[0]:
        measured["by_noise_level"] = sum(np.float64(b["by_noise_level"]) for b in batches).tolist()
    return measured


def means(window: list[dict]) -> dict:
    """The means of what `measurements` gave; `loss_by_noise_level` is None where no image was."""
    names = [name for name in window[0] if name != "by_noise_level"]
    line = {name: sum(measured[name] for measured in window) / len(window) for name in names}
    if "by_noise_level" in window[0]:
        sums, counts = np.sum([measured["by_noise_level"] for measured in window], axis=0)
        line["loss_by_noise_level"] = [
            total / count if count else None for total, count in zip(sums, counts, strict=True)
        ]
    return line


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; none if there is no such file, and not one cut short."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the process was killed while it wrote
            break
    return lines


def draw_loss(lines: list[dict], path: Path) -> None:
    """Draws the losses against the step."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4))).subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training")
    measured = [line for line in lines if "validation_loss" in line]
    if measured:
        steps, losses = zip(*((m["step"], m["validation_loss"]) for m in measured), strict=True)
        axes.plot(steps, losses, "o-", markersize=3, label="validation, averaged weights")
        axes.legend()
    axes.set(title="loss", xlabel="step", yscale="log")
    figure.savefig(path, dpi=100)


def draw_noise_levels(lines: list[dict], path: Path) -> None:
    """Draws the loss against the noise level: lately, and over the same time half-way there."""
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
    axes.set(title="loss", xlabel="timestep, as a share of all (1 is pure noise)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)
