"""Measures what fewer evaluations gain and what they cost: the figures of docs/speed.md.

    nice -n 19 python -m tools.measure_speedups images out/speedups
    python -m tools.measure_speedups speed out/speedups
    python -m tools.measure_speedups report out/speedups --plot docs/images/speed.png

`images` makes the shapes world's benchmark with each setting. `speed` alternates each setting with
the baseline, so both run under the same load; an idle machine is best. Each setting's result is a
separate file, so the commands may be interrupted and only make missing results. `report` judges the
images.
"""

import argparse
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import jaxdiff
from jaxdiff.families import operations
from jaxdiff.families.opening import open_ensemble
from jaxdiff.request import Bucket, Options
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS

PER_TAG, IMAGES, PROMPTS_SEED = 40, 2, 1  # 480 images
TIMED = 32  # images per round: four batches on a CPU
BATCH_SIZE = 8
DISTILLED = "shapes64-4step"
Z_95 = 1.96  # standard deviations from the mean that contain 95% of a normal distribution


@dataclass(frozen=True)
class Setting:
    """A model and sampling settings; `options` are passed to `jaxdiff.load`."""

    name: str
    family: str
    model: str = "shapes64"
    sampler: str = "euler_ancestral"
    steps: int = 20
    options: dict = field(default_factory=dict)

    def file(self, folder: Path, suffix: str) -> Path:
        """Returns the path of a result for this setting."""
        return folder / (self.name.replace(" ", "-").replace(",", "") + suffix)


PLAIN = Setting("euler_ancestral 20", "euler_ancestral")
FEWER_STEPS = [
    Setting(f"{sampler} {steps}", sampler, sampler=sampler, steps=steps)
    for sampler in ("euler_ancestral", "dpmpp_2m", "ddim")
    for steps in (5, 8, 12, 20)
    if (sampler, steps) != (PLAIN.sampler, PLAIN.steps)
]
MIDDLE = {"guidance_start": 0.2, "guidance_stop": 0.8}
INTERVALS = [
    Setting("guided 0 to 0.8", "guidance interval", options={"guidance_stop": 0.8}),
    Setting("guided 0.2 to 1", "guidance interval", options={"guidance_start": 0.2}),
    Setting("guided 0.2 to 0.8", "guidance interval", options=MIDDLE),
]
DEEP_CACHE = [Setting(f"deep cache {n}", "deep cache", options={"deep_cache": n}) for n in (2, 3)]
COMBINED = [
    Setting("12, guided 0.2 to 0.8", "combined", steps=12, options=MIDDLE),
    Setting("12, deep cache 2", "combined", steps=12, options={"deep_cache": 2}),
]
STUDENT = [
    Setting(f"{DISTILLED} {steps}", DISTILLED, DISTILLED, steps=steps) for steps in (1, 2, 3, 4)
]
UNCONNECTED = ("guidance interval", "combined")  # families without an order of their settings
SETTINGS = [PLAIN, *FEWER_STEPS, *INTERVALS, *DEEP_CACHE, *COMBINED, *STUDENT]


def make_images(folder: Path, rows: Sequence[dict], settings: Sequence[Setting]) -> None:
    """Makes an image of each row with each setting: one .npz each, uint8 [rows, 64, 64, 3]."""
    for setting in settings:
        path = setting.file(folder, ".npz")
        if path.exists():
            continue
        began = time.perf_counter()
        prompts = [row["prompt"] for row in rows]
        loaded = jaxdiff.load(setting.model, **setting.options)
        images = loaded.generate(_requests(setting, prompts), BATCH_SIZE)
        file = io.BytesIO()
        np.savez_compressed(file, pixels=np.stack([image.pixels for image in images]))
        _write(path, file.getvalue())
        print(f"{setting.name}: {time.perf_counter() - began:.0f} s", flush=True)


def measure_speed(folder: Path, rounds: int, settings: Sequence[Setting]) -> None:
    """Times each setting right after the baseline, `rounds` times; writes one .json per setting."""
    plain = _timer(settings[0])
    for setting in settings:
        path = setting.file(folder, ".json")
        if path.exists():
            continue
        timer = _timer(setting)
        seconds = [{"plain": plain(), "own": timer()} for _ in range(rounds)]
        _write(path, json.dumps(seconds).encode())
        print(f"{setting.name}: {_gain(seconds):.2f} times as fast", flush=True)


def _timer(setting: Setting) -> Callable[[], float]:
    """Compiles, then returns a function that makes `TIMED` images and returns the seconds."""
    loaded = jaxdiff.load(setting.model, **setting.options)
    requests = _requests(setting, ["a red circle"] * TIMED)
    loaded.generate(requests[:BATCH_SIZE], BATCH_SIZE)

    def timed() -> float:
        began = time.perf_counter()
        loaded.generate(requests, BATCH_SIZE)
        return time.perf_counter() - began

    return timed


def _requests(setting: Setting, prompts: Sequence[str]) -> list[jaxdiff.Request]:
    return [
        jaxdiff.Request(prompt=prompt, seed=seed, sampler=setting.sampler, steps=setting.steps)
        for seed, prompt in enumerate(prompts)
    ]


def _gain(seconds: Sequence[dict]) -> float:
    return statistics.median(pair["plain"] / pair["own"] for pair in seconds)


def _write(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    scratch.replace(path)


def results(folder: Path, rows: Sequence[dict], settings: Sequence[Setting]) -> list[dict]:
    """Returns the results of each finished setting, the baseline first; see `table`."""
    tags = [row["tag"] for row in rows]
    found, plain = [], None
    for setting in settings:
        if not setting.file(folder, ".npz").exists():
            continue
        with np.load(setting.file(folder, ".npz")) as made:
            pixels = made["pixels"]
        judged = (shapes.judge(row, image) for row, image in zip(rows, pixels, strict=True))
        correct = np.array([verdict.correct for verdict in judged], float)
        plain = correct if plain is None else plain
        ensemble = open_ensemble(setting.model)
        bucket = Bucket(CANVAS, CANVAS, setting.steps, True, setting.sampler)
        options = Options(**setting.options)
        steps = ensemble.steps(options, bucket)
        ((whole, spared),) = operations.evaluations(ensemble, options, steps)
        timed = setting.file(folder, ".json")
        found.append(
            asdict(setting)
            | {
                "correct": {
                    tag: int(sum(c for c, its in zip(correct, tags, strict=True) if its == tag))
                    for tag in shapes.TAGS
                },
                "images": len(rows),
                "score": mean_of_tags(correct, tags),
                "difference": mean_of_tags(correct - plain, tags),
                "evaluations": (whole, spared),
                "seconds": json.loads(timed.read_text()) if timed.exists() else None,
            }
        )
    return found


def mean_of_tags(values: np.ndarray, tags: Sequence[str]) -> tuple[float, float]:
    """Returns the mean of the tags' means and half of its 95% interval; values: [images]."""
    parts = [values[[each == tag for each in tags]] for tag in dict.fromkeys(tags)]
    variance = sum(part.var(ddof=1) / len(part) for part in parts) / len(parts) ** 2
    return float(np.mean([part.mean() for part in parts])), Z_95 * math.sqrt(variance)


def table(found: Sequence[dict]) -> str:
    """Returns the results as a Markdown table.

    The columns are: images per second; the speed relative to the baseline, as the median and range
    of the rounds; the evaluations per image, full ones and those shortened by DeepCache; the number
    of correct images for each tag; the mean score and its difference from the baseline, each with
    its 95% interval.
    """
    heads = ["setting", "images/s", "speed", "evaluations", *shapes.TAGS, "mean", "difference"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for one, rate in zip(found, _rates(found), strict=True):
        (score, within), (difference, apart) = one["score"], one["difference"]
        whole, spared = one["evaluations"]
        rows.append(
            [
                one["name"],
                f"{rate:.1f}" if rate else "",
                _times(one["seconds"]),
                f"{whole} + {spared}" if spared else f"{whole}",
                *map(str, one["correct"].values()),
                f"{score:.1%} ± {100 * within:.1f}",
                f"{100 * difference:+.1f} ± {100 * apart:.1f}" if one is not found[0] else "",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rates(found: Sequence[dict]) -> list[float | None]:
    """Returns the images per second of each setting, from its speed relative to the baseline.

    The baseline's rate is the median of all its rounds, which were under every load that there was.
    """
    plain = [pair["plain"] for one in found for pair in one["seconds"] or ()]
    return [
        one["seconds"] and TIMED / statistics.median(plain) * _gain(one["seconds"]) for one in found
    ]


def _times(seconds: Sequence[dict] | None) -> str:
    if seconds is None:
        return ""
    ratios = [pair["plain"] / pair["own"] for pair in seconds]
    return f"x{_gain(seconds):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def plot(found: Sequence[dict], path: Path) -> None:
    """Plots score against images per second; the bars are the scores' 95% intervals.

    Settings that were not timed are left out. The horizontal line is the baseline.
    """
    import matplotlib.pyplot as plt

    timed = [pair for pair in zip(found, _rates(found), strict=True) if pair[1]]
    figure, axes = plt.subplots(figsize=(9, 6), dpi=100)
    axes.axhline(100 * found[0]["score"][0], color="black", linewidth=0.8)
    for family in dict.fromkeys(one["family"] for one, _ in timed):
        members = [(one, rate) for one, rate in timed if one["family"] == family]
        members.sort(key=lambda pair: pair[0]["steps"])
        rates = [rate for _, rate in members]
        scores = [100 * one["score"][0] for one, _ in members]
        bars = [100 * one["score"][1] for one, _ in members]
        line = "" if family in UNCONNECTED else "-"
        axes.errorbar(rates, scores, bars, marker="o", linestyle=line, label=family, capsize=2)
        for (one, rate), score in zip(members, scores, strict=True):
            said = one["name"].removeprefix(family).strip()
            axes.annotate(said, (rate, score), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="images per second", ylabel="correct images, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("images", "speed", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-tag", type=int, default=PER_TAG)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="only settings whose names contain this, and the baseline")
    parser.add_argument("--plot", type=Path)
    said = parser.parse_args()
    said.folder.mkdir(parents=True, exist_ok=True)
    _claim(said.folder, {open_ensemble(one.model).fingerprint for one in SETTINGS})
    rows = [
        row
        for tag in shapes.TAGS
        for row in shapes.benchmark_rows(tag, said.per_tag, PROMPTS_SEED)
        for _ in range(IMAGES)
    ]
    chosen = [one for one in SETTINGS if one is PLAIN or (said.only or "") in one.name]
    if said.command == "images":
        make_images(said.folder, rows, chosen)
    elif said.command == "speed":
        measure_speed(said.folder, said.rounds, chosen)
    else:
        found = results(said.folder, rows, chosen)
        (said.folder / "speedups.json").write_text(json.dumps(found, indent=1))
        print(table(found))
        if said.plot:
            plot(found, said.plot)


def _claim(folder: Path, fingerprints: Collection[str]) -> None:
    """Ends the program if the folder has results of other models."""
    owners, models = folder / "models", "\n".join(sorted(fingerprints))
    if owners.exists() and owners.read_text() != models:
        raise SystemExit(f"error: {folder} holds other models' results; name a new folder")
    owners.write_text(models)


if __name__ == "__main__":
    main()
