"""Pure functions that are compiled ahead of their use, and traced once for all processes."""

import functools
import importlib.metadata
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax import export

from jaxdiff import cache
from jaxdiff.devices import compilation, parallel
from jaxdiff.devices.identity import identity

POOL = "compiling"  # the names of its threads begin with this
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event
THREADS = 2  # for compiling; more would delay the reading of weights
PACKAGES = ("jax", "jaxlib", "flax")
# What is exported is only used with the same versions, so it need not be compatible with others.
CHECKS = [export.DisabledSafetyCheck.custom_call("ALL")]

_waited = 0.0


class Program:
    """A pure function of arrays on a mesh.

    Tracing a large network takes seconds. What comes out is kept in the user's cache directory, by
    everything that it depends on: the function with all that it holds (`identity`), its arguments'
    shapes and shardings, jaxdiff's source code, the versions and settings of JAX.
    """

    def __init__(self, function: Callable, mesh: jax.sharding.Mesh, axes: Sequence):
        """Prepares the program; nothing is traced yet.

        Args:
          function: maps trees of arrays to trees of arrays. It holds only what `identity` knows.
          mesh: the devices.
          axes: the batch axes of its arguments, as in `parallel.over_data`.
        """
        self._function, self._mesh, self._axes = function, mesh, tuple(axes)
        self._exported: dict[str, export.Exported] = {}
        self._lock = threading.Lock()  # an exported program is asked for by several threads

    def compile(self, *arguments, **static) -> "Future[jax.stages.Compiled]":
        """Starts to compile the program for arguments of which only the shapes are known.

        Args:
          arguments: trees of arrays, or of `jax.ShapeDtypeStruct`s with their shardings.
          static: keyword arguments of the function, of which the program depends on the values.
        """
        return _pool().submit(lambda: self._compiled(arguments, static))

    def result(self, *arguments, **static) -> Any:
        """Returns the shapes of the result; the arguments are those of `compile`."""
        exported = self._traced(arguments, static)
        return exported.out_tree.unflatten(
            jax.ShapeDtypeStruct(each.shape, each.dtype) for each in exported.out_avals
        )

    def _compiled(self, arguments: tuple, static: dict) -> jax.stages.Compiled:
        exported = self._traced(arguments, static)

        def call(*arguments):
            return exported.call(jax.tree.leaves(arguments))

        # What caches and traces call it.
        call.__name__ = getattr(self._function, "func", self._function).__name__
        return compilation.jit(call, self._mesh).lower(*arguments).compile()

    def _traced(self, arguments: tuple, static: dict) -> export.Exported:
        leaves, structure = jax.tree.flatten(arguments)
        shapes = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
            for leaf in leaves
        ]
        versions = [importlib.metadata.version(name) for name in PACKAGES]
        settings = [f"{name}={value}" for name, value in sorted(jax.config.values.items())]
        described = identity([self._function, self._mesh, self._axes, static, shapes])
        here = jax.local_devices()[0].device_kind  # on which kernels of attention depend
        name = f"{described} {structure} {versions} {settings} {here}"

        def traced() -> bytes:
            function = functools.partial(self._function, **static)
            split = parallel.over_data(function, self._mesh, self._axes)
            jitted = jax.jit(lambda leaves: split(*structure.unflatten(leaves)))
            how = {"platforms": [self._platform], "disabled_checks": CHECKS}
            return bytes(export.export(jitted, **how)(shapes).serialize())

        with self._lock:
            if name not in self._exported:
                kept = cache.remembered("programs", name, traced)
                self._exported[name] = export.deserialize(bytearray(kept))
        return self._exported[name]

    @property
    def _platform(self) -> str:
        """The name of the devices' platform for `jax.export`."""
        first = self._mesh.devices.flat[0]
        if first.platform != "gpu":
            return first.platform
        return "rocm" if "rocm" in first.client.platform_version.lower() else "cuda"


def wait(programs: "dict[Any, Future[jax.stages.Compiled]]", key) -> "jax.stages.Compiled":
    """Waits for a program's compilation; drops it on failure, so that it can be retried."""
    global _waited
    began = time.monotonic()
    try:
        return programs[key].result()
    except BaseException:
        del programs[key]
        raise
    finally:
        _waited += time.monotonic() - began


def give_up() -> None:
    """Cancels queued compilations."""
    _pool().shutdown(wait=False, cancel_futures=True)
    _pool.cache_clear()


def seconds_waited() -> float:
    """Returns the total time for which this process has been blocked by compilation."""
    return _waited


def _count_other(event: str, seconds: float, **_) -> None:
    """Counts what JAX compiles in its caller, who waits: the drawing of noise, for example."""
    global _waited
    if event == COMPILED and not threading.current_thread().name.startswith(POOL):
        _waited += seconds


jax.monitoring.register_event_duration_secs_listener(_count_other)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Returns the threads that compile; XLA releases the interpreter lock meanwhile."""
    return ThreadPoolExecutor(THREADS, POOL)
