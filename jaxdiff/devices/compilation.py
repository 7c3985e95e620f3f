"""How programs are compiled: with which of XLA's options, ahead of their use, and kept on disk."""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxdiff.checkpoint.sources import cache_directory

# XLA's own convolutions are up to three times as fast on CPUs as those of the library that it
# takes by default; its reductions are slower. A full-size U-Net takes 0.7 of the time.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
THREADS = 2  # that compile; more would keep weights from being read
KEPT_BYTES = 2**33  # of compiled programs; the oldest go first
# Programs that are compiled fast are kept, too: a process starts with dozens of them.
SMALL_TOO = (
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)

log = logging.getLogger(__name__)
_waited = 0.0


def jit(function: Callable, **how) -> Callable:
    """`jax.jit` with the options for this device."""
    return jax.jit(function, compiler_options=_options(), **how)


def ahead(function: Callable, *arguments, **static) -> "Future[jax.stages.Compiled]":
    """Begins to compile a jitted function for arguments of which only the shapes are known.

    Args:
      function: what `jax.jit` gave.
      arguments: trees of arrays, or of `jax.ShapeDtypeStruct`s with their shardings.
      static: the static arguments.
    """
    return _pool().submit(lambda: function.lower(*arguments, **static).compile())


def wait(programs: "dict[Any, Future[jax.stages.Compiled]]", key) -> "jax.stages.Compiled":
    """The program that `ahead` has begun. A failure is forgotten, so that it may be tried again."""
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
    """Begins nothing more of what waits to be compiled."""
    _pool().shutdown(wait=False, cancel_futures=True)
    _pool.cache_clear()


def seconds_waited() -> float:
    """How long this process has waited for programs in all, beside what went on meanwhile."""
    return _waited


@functools.cache  # once in a process
def keep_programs() -> None:
    """Keeps what is compiled from now on in the user's cache directory, for later processes.

    JAX's own settings (JAX_COMPILATION_CACHE_DIR and so on) go first. A directory that cannot be
    written, or that others can write to (they could run code here), is done without.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = cache_directory() / "xla" / _cpu()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = directory.stat()
        usable = os.access(directory, os.W_OK) and facts.st_uid == os.getuid()
        usable = usable and not facts.st_mode & 0o022
    except (OSError, RuntimeError):  # the latter without a home directory
        usable = False
    if not usable:
        log.warning(
            "the user's cache directory is not ours alone to write: every process compiles anew; "
            "XDG_CACHE_HOME names another"
        )
        return
    _forget_oldest(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    for name in SMALL_TOO:
        if name.upper() not in os.environ:
            jax.config.update(name, 0)


def _forget_oldest(directory: Path) -> None:
    """Makes room. JAX's own bound stops storing for good after a kill at the wrong moment."""
    with contextlib.suppress(OSError):  # another process does the same
        newest_first = sorted(directory.iterdir(), key=lambda path: -path.stat().st_mtime)
        sizes = itertools.accumulate(path.stat().st_size for path in newest_first)
        for path, size in zip(newest_first, sizes, strict=True):
            if size > KEPT_BYTES:
                path.unlink()


def _cpu() -> str:
    """This kind of processor: what is compiled for one may crash another that shares the disk."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@functools.cache
def _options() -> dict[str, str] | None:
    if jax.default_backend() != "cpu":
        return None
    try:  # an experimental option: another version of XLA may not know it
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as problem:
        log.warning("slower convolutions, since XLA has changed: %s", problem)
        return None
    return CPU_OPTIONS


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads that compile; XLA leaves the interpreter to others meanwhile."""
    return ThreadPoolExecutor(THREADS, "compiling")
