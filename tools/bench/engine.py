"""An engine in a separate process, which prepares one part and runs it on request.

    python -m tools.bench.engine jaxdiff|diffusers DTYPE PART BATCH

The workload is a line of JSON on standard input, followed by one line per request.
"""

import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.bench.checkpoints import ROOT
from tools.bench.workload import Workload

SAMPLED = 1024  # numbers of an output that are compared between two engines
OUT_OF_MEMORY = re.compile(
    "out of memory|RESOURCE_EXHAUSTED|can't allocate memory|bad_alloc", re.IGNORECASE
)


class Column(NamedTuple):
    """An engine, "jaxdiff" or "diffusers", and the dtype it computes in."""

    name: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


class EngineError(Exception):
    """Raised if a part cannot be run; the message gives the reason, such as "out of memory"."""


class Engine:
    """A running engine; `close` ends it.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      device: the device's name.
      sample: a sample of the numbers in the first output.
    """

    def __init__(self, column: Column, part: str, batch: int, work: Workload, **environment: str):
        """Starts a process and waits until it has run the part once.

        Raises:
          EngineError: if the part cannot be run.
        """
        command = [sys.executable, "-m", "tools.bench.engine", *column, part, str(batch)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(work) | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._ask(asdict(work))
        self.platform, self.device = ready["platform"], ready["device"]
        self.sample = np.array(ready["sample"])

    def seconds(self) -> float:
        """Runs the part for one turn; returns the seconds per run."""
        return self._ask("turn")["seconds"]

    def peak_bytes(self) -> int:
        """Returns the peak memory: the device's, or on a CPU the process's."""
        return self._ask("peak")["bytes"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, what: dict | str) -> dict:
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EngineError(
                "killed; out of memory?" if code == -9 else f"ended with exit code {code}"
            )
        answer = json.loads(line)
        if failure := answer.get("failure"):
            self.close()
            raise EngineError(failure)
        return answer


def environment_of(work: Workload) -> dict[str, str]:
    """Returns the environment of a measured process: one GPU, JAX's memory share, its own cache."""
    cache = "JAX_COMPILATION_CACHE_DIR"  # would override XDG_CACHE_HOME, which `start` changes
    inherited = {name: text for name, text in os.environ.items() if name != cache}
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        **inherited,
        "XLA_CLIENT_MEM_FRACTION": f"{work.memory_fraction:.3f}",
    }


def main() -> None:
    """Serves one part of one engine until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stderr, so that stdout holds only answers
    name, dtype, part, batch = sys.argv[1:]
    work = Workload(**json.loads(sys.stdin.readline()))
    try:
        if name == "jaxdiff":
            from tools.bench import ours as engine
        else:
            from tools.bench import theirs as engine
        engine.prepare_process(work)
        run = engine.PARTS[part](work, dtype, int(batch))
        output = engine.to_numpy(run()).ravel()
        places = np.linspace(0, output.size - 1, min(SAMPLED, output.size)).astype(int)
        ready = {"platform": engine.platform(), "device": engine.device()}
        print(json.dumps(ready | {"sample": output[places].tolist()}), file=answers)
        for line in sys.stdin:
            if json.loads(line) == "turn":
                answer = {"seconds": _timed(run, work.turn_seconds)}
            else:
                answer = {"bytes": engine.device_peak_bytes() or _resident_peak_bytes()}
            print(json.dumps(answer), file=answers)
    except Exception as problem:
        traceback.print_exc()
        print(json.dumps({"failure": failure_of(problem)}), file=answers)


def _timed(run: Callable, at_least: float) -> float:
    began, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - began < at_least:
        run()
        runs += 1
    return (time.perf_counter() - began) / runs


def failure_of(problem: Exception) -> str:
    """Describes a failure on one line; "out of memory" is the same for every engine."""
    if isinstance(problem, MemoryError) or OUT_OF_MEMORY.search(str(problem)):
        return "out of memory"
    first, *_ = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {first}"


def _resident_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


if __name__ == "__main__":
    main()
