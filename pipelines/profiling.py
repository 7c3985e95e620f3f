"""A trace of a few batches, once in a process, for `--profile`."""

import os
from pathlib import Path

FIRST, LAST = 1, 5  # batches, counted from 0: the first is slower than the others


class Profile:
    """Counts batches and traces some, by `jax.profiler`, for TensorBoard, Perfetto or xprof."""

    def __init__(self, directory: str | None):
        self._folder = directory and Path(directory) / f"worker-{os.getpid()}"
        self._batches = 0
        self._running = False

    def batch(self) -> None:
        """Says that a batch begins."""
        if self._folder is None:
            return
        import jax

        if self._batches == FIRST:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._batches == LAST:
            self.end()
        self._batches += 1

    def end(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._running:
            import jax

            jax.profiler.stop_trace()
            self._running = False
