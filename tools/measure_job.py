"""How much of a bare sampling loop's speed the whole job keeps, on this machine.

    python -m tools.measure_job --images 512 --rounds 3

A round runs both, one after the other: `TextToImage.stream` over the images' requests, without
encoding or writing; and `jaxdiff generate` of the same images, of which the markers say how long
it has generated, encoded and written, without loading and compiling.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jaxdiff
from jaxdiff import cli
from jaxdiff.dataset import plan as plans

WARM_UP_IMAGES = 16


def main() -> None:
    """Prints each round's images per second and the share, and the median share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model", default="shapes64")
    said = parser.parse_args()
    model = jaxdiff.load(said.model)
    shares = []
    for _ in range(said.rounds):
        with tempfile.TemporaryDirectory() as folder:
            job, requests = _job_rate(Path(folder), said)
        bare = _bare_rate(model, requests, said.batch_size)
        shares.append(job / bare)
        print(f"bare {bare:.2f} images/s, job {job:.2f}, share {job / bare:.3f}", flush=True)
    print(f"median share {statistics.median(shares):.3f} of {said.images} images")


def _job_rate(folder: Path, said: argparse.Namespace) -> tuple[float, list[jaxdiff.Request]]:
    (folder / "prompts.txt").write_text("a red circle above a blue square\n")
    options = {"manifest": folder / "prompts.txt", "output": folder / "out", "model": said.model}
    options |= {"num-images": said.images, "batch-size": said.batch_size}
    code = cli.main(["generate", *(f"--{name}={value}" for name, value in options.items())])
    if code:
        raise SystemExit(code)
    seconds = json.loads((folder / "out" / "run.json").read_text())["seconds"]
    plan = plans.load(folder / "out")
    requests = [
        image.request
        for shard in range(len(plan.shard_sizes))
        for image in plans.read_shard(folder / "out", plan, shard)
    ]
    return said.images / (seconds["generate"] + seconds["write"]), requests


def _bare_rate(
    model: jaxdiff.TextToImage, requests: list[jaxdiff.Request], batch_size: int
) -> float:
    for _ in model.stream(requests[:WARM_UP_IMAGES], batch_size):
        pass
    began = time.monotonic()
    for _ in model.stream(requests, batch_size):
        pass
    return len(requests) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
