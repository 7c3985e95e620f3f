"""Starts the programs of several threads one after the other."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")

_lock = threading.Lock()
_last: tuple[int, Any] = (0, ())  # the thread that started a CPU's last program, and the result


def start(mesh: jax.sharding.Mesh, program: Callable[[], Result]) -> Result:
    """Starts a program; on a CPU, once those that other threads have started are finished.

    Two large programs at the same time in one process can compute wrong images on a CPU (measured
    with jaxlib 0.10.2: see docs/architecture.md). Those of one thread run one after the other.

    Args:
      mesh: the devices that run it.
      program: starts the program; no other call runs meanwhile, so it may use shared caches.

    Returns:
      its result, arrays that may not be ready yet.
    """
    global _last
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    with _lock:
        thread, result = _last
        if on_cpu and thread != threading.get_ident():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # for the other thread
                jax.block_until_ready(result)
        result = program()
        if on_cpu:
            _last = threading.get_ident(), result
    return result
