"""Measures jobs whose rows each bring another image: their speed, and their memory over time.

    python -m tools.measure_sources speed
    python -m tools.measure_sources memory --images 10000 --steps 2

Sources are JPEG files of 512x512 pixels. `speed` compares `jaxdiff generate` with a bare loop over
the loaded model, which is given the decoded pixels and writes nothing; both without loading and
compiling. `memory` prints the resident memory of the process that makes the images, every 5 s.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import jaxdiff
from jaxdiff.images import decoding, fitting
from jaxdiff.request import Request
from jaxdiff.worlds import shapes
from jaxdiff.worlds.shapes.scene import CANVAS

SOURCE_PX = 512
MIB = 2**20
EVERY_S = 5.0


def main() -> None:
    """Writes sources and a manifest, then measures and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    said = parser.parse_args()
    model = jaxdiff.load("shapes64") if said.what == "speed" else None
    for number in range(said.rounds if model else 1):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            captions = [*write(folder, said.images, number)]
            if model is None:
                watch(command(folder, said.steps))
                continue
            bare = said.images / loop(model, folder, captions, said.steps)
            subprocess.run(command(folder, said.steps), check=True, stdout=subprocess.DEVNULL)
            seconds = json.loads((folder / "out/run.json").read_text())["seconds"]
        job = said.images / (seconds["generate"] + seconds["write"])
        plan = 1e3 * seconds["plan"] / said.images
        print(
            f"loop {bare:.2f}, job {job:.2f} images/s: {job / bare:.3f}; plan {plan:.1f} ms/image"
        )


def write(folder: Path, count: int, seed: int) -> Iterator[str]:
    """Writes sources, each another scene, and a manifest; yields their captions."""
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(count):
            scene, caption = shapes.sample(np.random.default_rng([seed, number]))
            image = Image.fromarray(shapes.render(scene)).resize((SOURCE_PX, SOURCE_PX))
            image.save(folder / f"{number}.jpg", quality=90)
            rows.write(json.dumps({"prompt": caption, "image": f"{number}.jpg"}) + "\n")
            yield caption


def command(folder: Path, steps: int) -> list[str]:
    """Returns the job's command line."""
    options = {"manifest": folder / "rows.jsonl", "output": folder / "out", "steps": steps}
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "jaxdiff", "generate", *words]


def loop(model: jaxdiff.TextToImage, folder: Path, captions: Sequence[str], steps: int) -> float:
    """Makes the job's images from pixels in memory; returns the seconds after the first batch."""
    requests = []
    for number, caption in enumerate(captions):
        source = folder / f"{number}.jpg"
        pixels = fitting.fitted(decoding.decode(source.read_bytes(), source.name), CANVAS, CANVAS)
        requests.append(Request(prompt=caption, seed=number, steps=steps, image=pixels))
    model.generate([requests[0]])  # compiles
    began = time.perf_counter()
    model.generate(requests)
    return time.perf_counter() - began


def watch(words: Sequence[str]) -> None:
    """Runs a job and prints the resident memory of its largest process."""
    job, began = subprocess.Popen(words), time.monotonic()
    while job.poll() is None:
        time.sleep(EVERY_S)
        sizes = [_resident(child) for child in _descendants(job.pid)]
        print(
            f"{time.monotonic() - began:.0f} s: {max(sizes, default=0) / MIB:.0f} MiB", flush=True
        )
    if job.returncode:
        raise SystemExit("jaxdiff generate failed")


def _descendants(process: int) -> Iterator[int]:
    yield process
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:  # it has ended
        return
    for child in text.split():
        yield from _descendants(int(child))


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


if __name__ == "__main__":
    main()
