"""Compiles programs with the right XLA options, and caches them on disk."""

import functools
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable

import jax
from jax.sharding import SingleDeviceSharding

from jaxdiff import cache, processor

# On CPUs, XLA's own convolutions are up to three times as fast as those of the library that it
# uses by default, and a full-size U-Net takes 0.7 of the time. The library's reductions are faster
# than XLA's, and so are its products of bfloat16 (`models.products`).
CPU_LIBRARY = ("LIBRARY_FUSION_TYPE_REDUCE", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
# For batches of fewer than eight, XLA for TPUs cuts each image into strips and convolves those as a
# larger batch. The borders that the strips must exchange cost more than this gains: by the
# compiler's estimate, a residual block of Stable Diffusion XL takes half of the time without it
# (docs/tpu.md; a single image's decoder is slower).
STRIPS = ("xla_tpu_run_space_to_batch", "xla_tpu_run_space_to_batch_on_new_platforms")
OPTIONS = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ",".join(CPU_LIBRARY)},
    "tpu": dict.fromkeys(STRIPS, False),
}
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
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return jax.jit(function, compiler_options=_options(device), **how)


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
def _options(device: jax.Device) -> dict[str, str | bool] | None:
    def unchanged(x: jax.Array) -> jax.Array:
        return x

    options = OPTIONS.get(device.platform)
    anything = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:  # the options are experimental: another version of XLA may lack them
        jax.jit(unchanged, compiler_options=options).lower(anything).compile()
    except jax.errors.JaxRuntimeError as problem:
        log.warning("convolutions are slower, because this XLA lacks an option: %s", problem)
        return None
    return options
