"""Reports figures as JSON and Markdown: medians, ratios of paired rounds, shares of the peak."""

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tools.bench.checkpoints import ROOT
from tools.bench.engine import Column
from tools.bench.measure import Figure, Plan
from tools.bench.workload import Workload

PACKAGES = ("jax", "jaxlib", "flax", "apache-beam", "numpy", "torch", "diffusers", "transformers")
MACHINE_FACTS = {  # on Linux
    "processor": ("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
    "memory": ("/proc/meminfo", r"MemTotal:\s*(.+)"),
}


def machine() -> dict:
    """Describes this machine, as far as known, and its load average."""
    facts = {"system": platform.platform(), "cores": os.cpu_count()}
    for name, (path, pattern) in MACHINE_FACTS.items():
        if Path(path).exists() and (found := re.search(pattern, Path(path).read_text())):
            facts[name] = found[1]
    return facts | {"load average": os.getloadavg()[0]}


def versions() -> dict[str, str]:
    """Returns the versions of the packages and the commit of this checkout."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"python": platform.python_version(), "jaxdiff": said.stdout.strip()} | found


def ratios(figure: Figure, ours: Column, theirs: Column) -> list[float]:
    """Returns our value divided by theirs, for each round of both."""
    pairs = zip(figure.rounds.get(ours, ()), figure.rounds.get(theirs, ()), strict=False)
    return [ours / theirs for ours, theirs in pairs]


def peaks(figures: Sequence[Figure]) -> dict[str, float]:
    """Returns, by dtype, the highest operations/s of either engine's matrix product."""
    found: dict[str, float] = {}
    for figure in figures:
        if figure.name == "product":
            for column, seconds in figure.rounds.items():
                rate = figure.operations / statistics.median(seconds)
                found[column.dtype] = max(rate, found.get(column.dtype, 0.0))
    return found


def share_of_peak(figure: Figure, column: Column, peaks: dict[str, float]) -> float | None:
    """Returns the share of the peak that a figure reached; None if either is unknown."""
    if not figure.operations or not figure.rounds.get(column) or column.dtype not in peaks:
        return None
    seconds = statistics.median(figure.rounds[column])
    return figure.operations / seconds / peaks[column.dtype]


def difference(figure: Figure, ours: Column, theirs: Column) -> float | None:
    """Returns the difference of our output from theirs, relative to the norm of theirs."""
    if not {ours, theirs} <= figure.samples.keys():
        return None
    reference = figure.samples[theirs]
    return float(np.linalg.norm(figure.samples[ours] - reference) / np.linalg.norm(reference))


def as_json(figures: Sequence[Figure], work: Workload, plan: Plan) -> dict:
    """Returns the machine, the versions, the settings and every round of every figure."""
    settings = asdict(work) | asdict(plan) | {"columns": [str(column) for column in plan.columns]}
    top = peaks(figures)
    return {
        "machine": machine() | {"devices": _devices(figures)},
        "versions": versions(),
        "settings": settings,
        "peak operations per second": top,
        "figures": [_figure_as_json(figure, plan, top) for figure in figures],
    }


def _devices(figures: Sequence[Figure]) -> list[str]:
    return sorted({device for figure in figures for device in figure.devices.values()})


def _figure_as_json(figure: Figure, plan: Plan, top: dict[str, float]) -> dict:
    ours, *others = plan.columns
    return {
        "name": figure.name,
        "batch": figure.batch,
        "unit": figure.unit,
        "operations": figure.operations,
        "columns": {
            str(column): {
                "rounds": figure.rounds.get(column, []),
                "failure": figure.failures.get(column),
                "share of peak": share_of_peak(figure, column, top),
            }
            for column in plan.columns
        },
        "ratios": {
            str(theirs): {
                "rounds": ratios(figure, ours, theirs),
                "difference of outputs": difference(figure, ours, theirs),
            }
            for theirs in others
        },
    }


def as_markdown(figures: Sequence[Figure], plan: Plan) -> str:
    """Returns a table with one row per figure: medians, then ratios with minimum and maximum."""
    ours, *others = plan.columns
    top = peaks(figures)
    against = [f"ratio to {theirs}" for theirs in others]
    rows = [["what", "batch", "unit", *map(str, plan.columns), *against]]
    rows.append(["---", "---:", "---", *["---:"] * (len(rows[0]) - 3)])
    for figure in figures:
        cells = [_cell(figure, column, top) for column in plan.columns]
        cells += [_ratio_cell(ratios(figure, ours, theirs)) for theirs in others]
        rows.append([figure.name, str(figure.batch), figure.unit, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(figure: Figure, column: Column, top: dict[str, float]) -> str:
    if column in figure.failures:
        return figure.failures[column]
    if not figure.rounds.get(column):
        return ""
    share = share_of_peak(figure, column, top)
    value = f"{statistics.median(figure.rounds[column]):.4g}"
    return value if share is None else f"{value} ({share:.0%} of peak)"


def _ratio_cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"**{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"
