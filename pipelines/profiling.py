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

    def batch(self, *, only: bool) -> None:
        """Says that a batch begins, and whether it is the only one of its shard."""
        if self._folder is None or self._batches > LAST:
            return
        import jax

        if not self._running and (self._batches == FIRST or only):
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._batches == LAST:
            self.end()
        self._batches += 1

    def end(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._running:
            import jax

            self._running, self._batches = False, LAST + 1
            jax.profiler.stop_trace()
