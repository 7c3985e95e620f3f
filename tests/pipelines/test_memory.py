"""Memory does not grow with the number of shards."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdiff.dataset import names

SHARDS, IMAGES_PER_SHARD = 52, 64
# Resident memory varies by a few MB with the allocator and the moment of measurement (up to 10 MB
# observed). The pixels made in the meantime take 35 MB, their files and records more.
NOISE_MB = 15


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.slow
def test_memory_is_flat_from_the_fifth_shard_to_the_fiftieth(tmp_path, command, environment):
    directory, manifest = tmp_path / "out", tmp_path / "many.jsonl"
    row = {"prompt": "a ring", "num_images": SHARDS * IMAGES_PER_SHARD}
    manifest.write_text(json.dumps(row))
    more = [f"--images-per-shard={IMAGES_PER_SHARD}", "--batch-size=8", "--steps=1"]
    job = [sys.executable, "-m", "jaxdiff", *command(directory, *more, manifest=manifest)]
    at_5 = None
    with subprocess.Popen(job, env=environment, stderr=subprocess.DEVNULL) as driver:
        while (made := len(list((directory / names.DONE).glob("*.json")))) < 50:
            assert driver.poll() is None
            if made >= 5 and at_5 is None:
                at_5 = memory(driver.pid)
            time.sleep(0.01)
        at_50 = memory(driver.pid)
        assert driver.wait() == 0
    for earlier, later in zip(at_5, at_50, strict=True):
        assert later - earlier < NOISE_MB, (at_5, at_50)


def memory(driver: int) -> tuple[float, float]:
    """Returns the resident memory of the driver and of its worker, in MB."""
    found = subprocess.run(["pgrep", "-P", str(driver)], capture_output=True, text=True)
    (worker,) = found.stdout.split()
    return resident_mb(driver), resident_mb(int(worker))
