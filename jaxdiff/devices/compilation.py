"""Compiles programs with the right XLA options, ahead of their use, and caches them on disk."""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxdiff.checkpoint.sources import cache_directory
from jaxdiff.devices import program_folder

# On CPUs, XLA's own convolutions are up to three times as fast as those of the library that it
# uses by default, but its reductions are slower. A full-size U-Net takes 0.7 of the time.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
THREADS = 2  # for compiling; more would delay the reading of weights
KEPT_BYTES = 2**33  # of compiled programs; the oldest are deleted first
# Programs that compile quickly are cached, too: a process starts with dozens of them.
SMALL_TOO = (
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
# XLA's own caches are for GPUs alone, but where they are on, the directory's path is part of each
# program's key: in a copy of the directory, none would be found.
XLAS_OWN = "jax_persistent_cache_enable_xla_caches"

log = logging.getLogger(__name__)
_waited = 0.0


def jit(function: Callable, mesh: jax.sharding.Mesh | None = None, **how) -> Callable:
    """Calls `jax.jit` with the compiler options for the devices of `mesh`.

    Args:
      function: what to compile.
      mesh: the devices that run it; None means this host's, of JAX's default platform.
      **how: other arguments of `jax.jit`.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options = _cpu_options() if platform == "cpu" else None
    return jax.jit(function, compiler_options=options, **how)


def ahead(function: Callable, *arguments, **static) -> "Future[jax.stages.Compiled]":
    """Starts to compile a jitted function for arguments of which only the shapes are known.

    Args:
      function: the result of `jax.jit`.
      arguments: trees of arrays, or of `jax.ShapeDtypeStruct`s with their shardings.
      static: the static arguments.
    """
    return _pool().submit(lambda: function.lower(*arguments, **static).compile())


def wait(programs: "dict[Any, Future[jax.stages.Compiled]]", key) -> "jax.stages.Compiled":
    """Waits for a program that `ahead` started; drops it on failure, so that it can be retried."""
    global _waited
    began = time.monotonic()
    try:
        return programs[key].result()
    except BaseException:
        del programs[key]
        raise
    finally:
        _waited += time.monotonic() - began


def without_memory(problem: jax.errors.JaxRuntimeError) -> int:
    """Returns more bytes than any device has if memory ran out; else raises the error again."""
    if "RESOURCE_EXHAUSTED" not in str(problem):
        raise problem
    return sys.maxsize


def give_up() -> None:
    """Cancels queued compilations."""
    _pool().shutdown(wait=False, cancel_futures=True)
    _pool.cache_clear()


def seconds_waited() -> float:
    """Returns the total time for which this process has been blocked by compilation."""
    return _waited


@functools.cache  # once in a process
def keep_programs() -> None:
    """Caches programs compiled from now on in the user's cache directory, for later processes.

    JAX's own settings (JAX_COMPILATION_CACHE_DIR and so on) take precedence. A directory that
    cannot be written, or that others can write to (they could run code here), is not used.
    """
    if XLAS_OWN.upper() not in os.environ and jax.default_backend() != "gpu":
        jax.config.update(XLAS_OWN, "none")
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = cache_directory() / "xla" / _cpu()
    except RuntimeError:  # without a home directory
        directory = None
    if directory is None or not program_folder.make(directory):
        log.warning(
            "compiled programs are not cached: the user's cache directory is not writable, or is "
            "writable by others; set XDG_CACHE_HOME to another directory"
        )
        return
    _forget_oldest(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    for name in SMALL_TOO:
        if name.upper() not in os.environ:
            jax.config.update(name, 0)


def _forget_oldest(directory: Path) -> None:
    """Deletes the oldest programs to make room.

    JAX's own limit is not used: after a kill at the wrong moment, it never stores anything again.
    """
    with contextlib.suppress(OSError):  # another process may do the same
        newest_first = sorted(directory.iterdir(), key=lambda path: -path.stat().st_mtime)
        sizes = itertools.accumulate(path.stat().st_size for path in newest_first)
        for path, size in zip(newest_first, sizes, strict=True):
            if size > KEPT_BYTES:
                path.unlink()


def _cpu() -> str:
    """Identifies the kind of processor, since code compiled for one may crash on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@functools.cache
def _cpu_options() -> dict[str, str] | None:
    try:  # the option is experimental: another version of XLA may lack it
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as problem:
        log.warning("convolutions are slower, because this XLA lacks an option: %s", problem)
        return None
    return CPU_OPTIONS


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Returns the threads that compile; XLA releases the interpreter lock meanwhile."""
    return ThreadPoolExecutor(THREADS, "compiling")
