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
from collections.abc import Callable, Sequence
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
GUIDANCE_SCALE = 3.0
Z_95 = 1.96  # standard deviations from the mean that contain 95% of a normal distribution


@dataclass(frozen=True)
class Setting:
    """Sampling settings; `options` are passed to `jaxdiff.load`."""

    name: str
    family: str
    sampler: str = "ddim"
    steps: int = 20
    options: dict = field(default_factory=dict)

    def file(self, folder: Path, suffix: str) -> Path:
        """Returns the path of a result for this setting."""
        return folder / (self.name.replace(" ", "-").replace(",", "") + suffix)


PLAIN = Setting("ddim 20", "plain")
FEWER_STEPS = [
    Setting(f"{sampler} {steps}", sampler, sampler, steps)
    for sampler in ("ddim", "dpmpp_2m", "unipc")
    for steps in (6, 8, 10, 12, 15)
]
INTERVALS = [
    Setting(f"guided {start:g} to {stop:g}", "guidance interval", options=options)
    for start, stop in ((0, 0.8), (0, 0.6), (0.1, 1), (0.2, 1), (0.2, 0.8))
    if (options := {"guidance_start": start, "guidance_stop": stop})
]
DEEP_CACHE = [
    Setting(f"deep cache {n}", "deep cache", options={"deep_cache": n}) for n in (2, 3, 5)
]
MIDDLE = {"guidance_start": 0.2, "guidance_stop": 0.8}
COMBINED = [
    Setting(f"{sampler} {steps}, {said}", "combined", sampler, steps, options)
    for sampler, steps in (("ddim", 20), ("dpmpp_2m", 12), ("unipc", 12))
    for said, options in (
        ("guided 0.2 to 0.8", MIDDLE),
        ("deep cache 2", {"deep_cache": 2}),
        ("both", MIDDLE | {"deep_cache": 2}),
    )
    if sampler != "ddim" or said == "both"
]
SETTINGS = [PLAIN, *FEWER_STEPS, *INTERVALS, *DEEP_CACHE, *COMBINED]


def make_images(folder: Path, model: str, rows: Sequence[dict], settings: Sequence[Setting]):
    """Makes an image of each row with each setting: one .npz each, uint8 [rows, 64, 64, 3]."""
    for setting in settings:
        path = setting.file(folder, ".npz")
        if path.exists():
            continue
        began = time.perf_counter()
        prompts = [row["prompt"] for row in rows]
        images = jaxdiff.load(model, **setting.options).generate(_requests(setting, prompts))
        file = io.BytesIO()
        np.savez_compressed(file, pixels=np.stack([image.pixels for image in images]))
        _write(path, file.getvalue())
        print(f"{setting.name}: {time.perf_counter() - began:.0f} s", flush=True)


def measure_speed(folder: Path, model: str, rounds: int, settings: Sequence[Setting]) -> None:
    """Times each setting right after the baseline, `rounds` times; writes one .json per setting."""
    plain = _timer(model, PLAIN)
    for setting in settings:
        path = setting.file(folder, ".json")
        if path.exists():
            continue
        timer = _timer(model, setting)
        seconds = [{"plain": plain(), "own": timer()} for _ in range(rounds)]
        _write(path, json.dumps(seconds).encode())
        print(f"{setting.name}: {_gain(seconds):.2f} times as fast", flush=True)


def _timer(model: str, setting: Setting) -> Callable[[], float]:
    """Compiles, then returns a function that makes `TIMED` images and returns the seconds."""
    loaded = jaxdiff.load(model, **setting.options)
    requests = _requests(setting, ["a red circle"] * TIMED)
    loaded.generate(requests[:BATCH_SIZE], BATCH_SIZE)

    def timed() -> float:
        began = time.perf_counter()
        loaded.generate(requests, BATCH_SIZE)
        return time.perf_counter() - began

    return timed


def _requests(setting: Setting, prompts: Sequence[str]) -> list[jaxdiff.Request]:
    return [
        jaxdiff.Request(
            prompt=prompt,
            seed=seed,
            sampler=setting.sampler,
            steps=setting.steps,
            guidance_scale=GUIDANCE_SCALE,
        )
        for seed, prompt in enumerate(prompts)
    ]


def _gain(seconds: Sequence[dict]) -> float:
    return statistics.median(pair["plain"] / pair["own"] for pair in seconds)


def _write(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    scratch.replace(path)


def results(
    folder: Path, model: str, rows: Sequence[dict], settings: Sequence[Setting]
) -> list[dict]:
    """Returns the results of each finished setting, the baseline first; see `table`."""
    tags, ensemble = [row["tag"] for row in rows], open_ensemble(model)
    found, plain, plain_correct = [], None, None
    for setting in settings:
        if not setting.file(folder, ".npz").exists():
            continue
        with np.load(setting.file(folder, ".npz")) as made:
            pixels = made["pixels"]
        judged = (shapes.judge(row, image) for row, image in zip(rows, pixels, strict=True))
        correct = np.array([verdict.correct for verdict in judged], float)
        if plain is None:
            plain, plain_correct = pixels, correct
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
                "difference": mean_of_tags(correct - plain_correct, tags),
                "psnr": statistics.median(map(psnr, pixels, plain)) if found else None,
                "evaluations": (whole, spared),
                "operations": int(
                    operations.of_image(ensemble, Options(**setting.options), bucket)
                ),
                "seconds": json.loads(timed.read_text()) if timed.exists() else None,
            }
        )
    return found


def mean_of_tags(values: np.ndarray, tags: Sequence[str]) -> tuple[float, float]:
    """Returns the mean of the tags' means and half of its 95% interval; values: [images]."""
    parts = [values[[each == tag for each in tags]] for tag in dict.fromkeys(tags)]
    variance = sum(part.var(ddof=1) / len(part) for part in parts) / len(parts) ** 2
    return float(np.mean([part.mean() for part in parts])), Z_95 * math.sqrt(variance)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 images in dB; infinite if equal."""
    error = np.mean((image.astype(float) - other) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def table(found: Sequence[dict]) -> str:
    """Returns the results as a Markdown table.

    The columns are: the speed relative to the baseline, as the median and range of the rounds; the
    evaluations per image, full ones and those shortened by DeepCache; the number of correct images
    for each tag; the mean score and its difference from the baseline, each with its 95% interval;
    the median PSNR to the baseline's images.
    """
    heads = ["setting", "images/s", "evaluations", *shapes.TAGS, "mean", "difference", "PSNR"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for one in found:
        (score, within), (difference, apart) = one["score"], one["difference"]
        whole, spared = one["evaluations"]
        is_plain = one["name"] == PLAIN.name
        rows.append(
            [
                one["name"],
                _times(one["seconds"]),
                f"{whole} + {spared}" if spared else f"{whole}",
                *map(str, one["correct"].values()),
                f"{score:.1%} ± {100 * within:.1f}",
                "" if is_plain else f"{100 * difference:+.1f} ± {100 * apart:.1f}",
                "" if is_plain else f"{one['psnr']:.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _times(seconds: Sequence[dict] | None) -> str:
    if seconds is None:
        return ""
    ratios = [pair["plain"] / pair["own"] for pair in seconds]
    return f"x{_gain(seconds):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def plot(found: Sequence[dict], path: Path) -> None:
    """Plots score against speed; the bars are 95% intervals of the difference from the baseline.

    The horizontal line is the baseline.
    """
    import matplotlib.pyplot as plt

    plain, *others = found
    figure, axes = plt.subplots(figsize=(8, 5), dpi=100)
    axes.axhline(100 * plain["score"][0], color="black", linewidth=0.8)
    axes.plot(1, 100 * plain["score"][0], "k*", markersize=12, label=plain["name"])
    for family in dict.fromkeys(one["family"] for one in others):
        members = [one for one in others if one["family"] == family and one["seconds"]]
        speeds = [_gain(one["seconds"]) for one in members]
        scores = [100 * one["score"][0] for one in members]
        bars = [100 * one["difference"][1] for one in members]
        line = "-" if family not in ("combined", "guidance interval") else ""
        axes.errorbar(speeds, scores, bars, marker="o", linestyle=line, label=family, capsize=2)
        for one, *point in zip(members, speeds, scores, strict=True):
            said = one["name"].removeprefix(family).removeprefix("guided").strip()
            said = said.replace("guided 0.2 to 0.8", "guided").replace("deep cache", "cache")
            axes.annotate(said, point, (4, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.1)
    axes.set(xlabel="images per second, relative to the baseline", ylabel="correct images, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("images", "speed", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="shapes64")
    parser.add_argument("--per-tag", type=int, default=PER_TAG)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="only settings whose names contain this, and the baseline")
    parser.add_argument("--plot", type=Path)
    said = parser.parse_args()
    said.folder.mkdir(parents=True, exist_ok=True)
    _claim(said.folder, open_ensemble(said.model).fingerprint)
    rows = [
        row
        for tag in shapes.TAGS
        for row in shapes.benchmark_rows(tag, said.per_tag, PROMPTS_SEED)
        for _ in range(IMAGES)
    ]
    chosen = [one for one in SETTINGS if one is PLAIN or (said.only or "") in one.name]
    if said.command == "images":
        make_images(said.folder, said.model, rows, chosen)
    elif said.command == "speed":
        measure_speed(said.folder, said.model, said.rounds, chosen)
    else:
        found = results(said.folder, said.model, rows, chosen)
        (said.folder / "speedups.json").write_text(json.dumps(found, indent=1))
        print(table(found))
        if said.plot:
            plot(found, said.plot)


def _claim(folder: Path, fingerprint: str) -> None:
    """Ends the program if the folder has results of another model."""
    owner = folder / "model"
    if owner.exists() and owner.read_text() != fingerprint:
        raise SystemExit(f"error: {folder} holds another model's results; name a new folder")
    owner.write_text(fingerprint)


if __name__ == "__main__":
    main()
