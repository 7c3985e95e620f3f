"""Traces a few batches, once per process, for `--profile`."""

import os
from pathlib import Path

FIRST, LAST = 1, 5  # batches, counted from 0; batch 0 is slower than the others


class Profile:
    """Counts batches and traces some with `jax.profiler`, for TensorBoard, Perfetto or xprof."""

    def __init__(self, directory: str | None):
        self._folder = directory and Path(directory) / f"worker-{os.getpid()}"
        self._batches = 0
        self._running = False

    def batch(self, *, only: bool) -> None:
        """Notes the start of a batch, and whether it is the only one of its shard."""
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
        """Ends and writes the trace, if one is running."""
        if self._running:
            import jax

            self._running, self._batches = False, LAST + 1
            jax.profiler.stop_trace()
