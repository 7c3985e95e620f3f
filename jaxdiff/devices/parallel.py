"""The device mesh of one host and the sharding of arrays over it.

Batches are split over `data`. Parameters are split over `model` by the rules below, for networks
that do not fit on one device; for those that do, pure data parallelism is faster.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.devices.mesh_sizes import mesh_sizes
from jaxdiff.errors import InputError

AXES = ("data", "model")

log = logging.getLogger(__name__)


def make_mesh(spec: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh that `spec` describes over a host's devices.

    Warns about virtual CPU devices without spare threads: see `_without_spare_threads`.

    Args:
      spec: for example "data=4" or "data=4,model=2", with any sizes: the first devices are used,
        and the others stay idle. None uses every device for `data`.
      devices: None for this host's; or devices of another kind, which need not exist: programs
        can be compiled for them.

    Raises:
      InputError: if `spec` cannot be parsed, or asks for more devices than there are.
    """
    devices = jax.local_devices() if devices is None else devices
    sizes = mesh_sizes(spec, len(devices))
    count = sizes["data"] * sizes["model"]
    grid = np.array(devices[:count]).reshape(sizes["data"], sizes["model"])
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
    if _without_spare_threads(mesh):
        log.warning(
            "%d virtual CPU devices with so few threads can make wrong images: set NPROC=%d",
            mesh.size,
            2 * mesh.size,
        )
    return mesh


def host_mesh() -> Mesh:
    """Makes the mesh of this host's CPU alone, beside those of its accelerators.

    Raises:
      InputError: if JAX was told to use no CPU.
    """
    try:
        return make_mesh("data=1", jax.local_devices(backend="cpu"))
    except RuntimeError:
        raise InputError(
            "--text-encoders host needs JAX's CPU backend: add cpu to JAX_PLATFORMS, such as "
            "JAX_PLATFORMS=cuda,cpu"
        ) from None


def _without_spare_threads(mesh: Mesh) -> bool:
    """Checks whether XLA may compute wrong results here: measured with jaxlib 0.10.2, on two cores.

    With two virtual devices and two threads, the first of each device's images came out wrong,
    sometimes or always, in a program whose parts each gave the same result every time; with four
    or eight threads all were right. A single device is not affected.
    """
    return not may_run_ahead(mesh) and _threads() <= mesh.size


def may_run_ahead(mesh: Mesh) -> bool:
    """Checks whether a program may be started before the previous one has finished.

    XLA's virtual CPU devices share one pool of threads: with two programs running, the all-reduces
    of each can wait forever for threads that the other holds.
    """
    return mesh.size == 1 or mesh.devices.flat[0].platform != "cpu"


def hardware(mesh: Mesh) -> str:
    """Describes what determines a program's last bits: the kind of device, and a CPU's threads.

    XLA splits sums among as many threads as there are cores (or virtual devices, if there are more
    of those), unless NPROC sets the number.
    """
    first = mesh.devices.flat[0]
    if first.platform != "cpu":
        return first.device_kind
    return f"{first.device_kind}, {_threads()} threads"


def _threads() -> int:
    """Returns how many threads XLA computes with on CPUs."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count()
    said = (os.environ.get(name, "") for name in ("PJRT_NPROC", "NPROC"))
    threads = next((int(text) for text in said if re.fullmatch(r"[1-9][0-9]{0,5}", text)), cores)
    return max(threads, jax.local_device_count())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding that splits one axis of an array over `data`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def over_data(function: Callable, mesh: Mesh, axes: Sequence[int | None]) -> Callable:
    """Wraps `function` so that each device of `data` calls it on its own part of a batch.

    By construction, a device computes for its part what a lone device would, and nothing is
    exchanged over `data`; over `model`, XLA splits and exchanges as usual.

    Args:
      function: maps trees of arrays to trees of arrays [part, ...].
      axes: for each argument, the batch axis of its arrays; None gives every device the whole
        argument. If all are None, each device of `data` computes the same, and the result is not
        split either.
    """

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")

    def is_none(axis) -> bool:
        return axis is None

    specs = jax.tree.map(spec, tuple(axes), is_leaf=is_none)
    is_split = any(axis is not None for axis in jax.tree.leaves(tuple(axes), is_leaf=is_none))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec("data") if is_split else PartitionSpec(),
        axis_names={"data"},
        check_vma=False,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def fully_sharded(mesh: Mesh, shapes: dict) -> dict:
    """Returns shardings that split each array over `data`, as training does with its state.

    The largest axis that the number of devices divides is split; an array without one is copied.
    XLA gathers a layer's weights where it needs them (FSDP; Rajbhandari et al., 2020,
    arXiv:1910.02054).

    Args:
      shapes: nested dict of anything with a `.shape`.
    """
    parts = mesh.shape["data"]

    def sharding(leaf) -> NamedSharding:
        sizes = [0 if size % parts else size for size in leaf.shape]
        if not any(sizes):
            return replicated(mesh)
        return batch_sharding(mesh, axis=sizes.index(max(sizes)))

    return jax.tree.map(sharding, shapes)


def parameter_shardings(mesh: Mesh, shapes: dict, rules: Sequence[tuple[str, int]]) -> dict:
    """Returns the sharding of each parameter.

    Args:
      shapes: nested dict of anything with a `.shape`.
      rules: pairs of a pattern and the axis that is split; the first whose pattern is found in a
        parameter's dotted path applies, and parameters without a rule are copied.

    Raises:
      InputError: if nothing would be split, because `model` divides none of the axes.
    """
    parts = mesh.shape["model"]

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        axes = (axis for pattern, axis in rules if re.search(pattern, name))
        axis = next(axes, None)
        if axis is None or leaf.shape[axis] % parts:
            return replicated(mesh)
        after = [None] * (-1 - axis)
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim + axis), "model", *after))

    shardings = jax.tree_util.tree_map_with_path(sharding, shapes)
    if all(found.is_fully_replicated for found in jax.tree.leaves(shardings)) and parts > 1:
        raise InputError(
            f"--mesh model={parts}: divides none of this model's widths; use a power of 2"
        )
    return shardings
