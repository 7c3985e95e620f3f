"""Compiles programs with the right XLA options, and caches them on disk."""

import functools
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable

import jax

from jaxdiff import cache, processor

# On CPUs, XLA's own convolutions are up to three times as fast as those of the library that it
# uses by default, and a full-size U-Net takes 0.7 of the time. The library's reductions are faster
# than XLA's, and so are its products of bfloat16 (`models.products`).
CPU_LIBRARY = ("LIBRARY_FUSION_TYPE_REDUCE", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ",".join(CPU_LIBRARY)}
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


def without_memory(problem: jax.errors.JaxRuntimeError) -> int:
    """Returns more bytes than any device has if memory ran out; else raises the error again."""
    if "RESOURCE_EXHAUSTED" not in str(problem):
        raise problem
    return sys.maxsize


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
    directory = cache.private(f"xla/{_cpu()}")
    if directory is None:
        log.warning(
            "compiled programs are not cached: the user's cache directory is not writable, or is "
            "writable by others; set XDG_CACHE_HOME to another directory"
        )
        return
    # JAX's own limit is not used: after a kill at the wrong moment, it never stores anything again.
    cache.forget_oldest(directory, KEPT_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    for name in SMALL_TOO:
        if name.upper() not in os.environ:
            jax.config.update(name, 0)


def _cpu() -> str:
    """Identifies the kind of processor, since code compiled for one may crash on another."""
    features = " ".join(sorted(processor.features()))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@functools.cache
def _cpu_options() -> dict[str, str] | None:
    try:  # the option is experimental: another version of XLA may lack it
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as problem:
        log.warning("convolutions are slower, because this XLA lacks an option: %s", problem)
        return None
    return CPU_OPTIONS
