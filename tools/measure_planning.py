"""Measures the time and memory of planning a manifest, reading a shard, and extending the plan.

    python tools/measure_planning.py [--rows 1000000] [--images-per-shard N]

Each part runs in its own process; prints its seconds, those that its threads spent on CPUs, and the
peak resident memory from the kernel. On a busy machine, only the seconds on CPUs can be compared.
"""

import argparse
import json
import multiprocessing
import random
import re
import tempfile
import time
from pathlib import Path

from jaxdiff.dataset import names, planning
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.manifest import manifest as manifests
from jaxdiff.families.opening import open_ensemble

WORDS = ("a", "red", "blue", "large", "small", "circle", "square", "ring", "above", "of", "and")
MODELS = {"model": "shapes64", "variant": None, "refiner": None}


def main() -> None:
    """Writes a manifest, then plans, reads and extends it and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images-per-shard", type=int)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows.jsonl", Path(folder) / "out"
        _write(rows, 0, said.rows)
        _in_a_process("planned", _plan, rows, output, said.images_per_shard)
        _in_a_process("one shard read", _read, output)
        _write(rows, said.rows, said.rows // 10)
        _in_a_process("extended by a tenth", _plan, rows, output, said.images_per_shard)


def _write(path: Path, start: int, count: int) -> None:
    words = random.Random(start)
    with path.open("a") as file:
        for number in range(start, start + count):
            prompt = " ".join(words.choices(WORDS, k=10))
            row = {"id": f"row-{number}", "prompt": prompt, "category": words.choice(WORDS)}
            file.write(json.dumps(row) + "\n")


def _in_a_process(what: str, function, *arguments) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_measure, args=(what, function, *arguments)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{what}: failed")


def _measure(what: str, function, *arguments) -> None:
    began, used = time.monotonic(), time.process_time()
    said = function(*arguments)
    seconds, of_cpu = time.monotonic() - began, time.process_time() - used
    status = Path("/proc/self/status").read_text()
    peak_bytes = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    times = f"{seconds:.1f} s ({of_cpu:.1f} s of CPU)"
    print(f"{what}: {said} in {times}, {peak_bytes / 1e9:.2f} GB", flush=True)


def _plan(path: Path, output: Path, images_per_shard: int | None) -> str:
    model = open_ensemble("shapes64")
    settings = job_settings.resolve({"images_per_shard": images_per_shard}, model)
    manifest = manifests.find(path)
    identity = planning.identify(manifest, settings, model)
    old, store = runs.find(output), LocalStore(output)
    folder = store.scratch("plan")
    planning.make(manifest, settings, model, identity, folder, models=MODELS, extended=old)
    run = runs.begin(folder, store)
    run.tidy()
    size = sum(file.stat().st_size for file in store.path(names.PLAN).iterdir())
    return f"{run.plan.images} images in {len(run.shards)} shards ({size / 1e6:.0f} MB)"


def _read(output: Path) -> str:
    run = runs.open_run(output)
    return f"{len(run.planned(len(run.shards) // 2))} images"


if __name__ == "__main__":
    main()
