"""The device mesh of one host, and which axis of which array lies along it.

Batches are split over `data`. Parameters are split over `model` by the rules below, for networks
that do not fit one device; pure data parallelism is faster wherever they do.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.errors import InputError

AXES = ("data", "model")

log = logging.getLogger(__name__)

# The axis of a parameter that is split: a kernel's last is its outputs, the one before its inputs.
COLUMNS, ROWS = -1, -2

# The first rule whose pattern is found in a parameter's dotted path holds; the others are copied.
# Megatron's layout (Shoeybi et al., 2019, arXiv:1909.08053), also inside residual blocks: columns,
# then rows, so that what lies between stays split and only the rows' products are summed up.
# GEGLU's value and gate are one kernel, so each device must fetch its half of the one or the other.
PARAMETER_RULES = (
    (r"\.(to_[qkv]|[qkv]_proj|fc1|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|out_proj|fc2|net\.2|linear_2)\.kernel$", ROWS),
    (r"\.(conv1|time_emb_proj)\.kernel$", COLUMNS),
    (r"\.(conv2|conv_shortcut)\.kernel$", ROWS),
    (r"\.(\w+samplers\.\d+\.conv|proj_in|proj_out)\.kernel$|^text_projection\.kernel$", ROWS),
    (r"_embedding\.embedding$", COLUMNS),
)


def make_mesh(spec: str | None = None) -> Mesh:
    """The mesh that `spec` describes over this host's devices.

    Warns of virtual CPU devices that have no threads to spare: see `_without_spare_threads`.

    Args:
      spec: such as "data=4" or "data=4,model=2", of any sizes: the first so many devices are taken,
        and the others stay idle. None takes every device for `data`.

    Raises:
      InputError: if the text cannot be read, or asks for more devices than there are.
    """
    devices = jax.local_devices()
    sizes = {"data": len(devices), "model": 1} if spec is None else _sizes(spec)
    count = sizes["data"] * sizes["model"]
    if count > len(devices):
        raise InputError(f"--mesh {spec}: needs {count} devices, but there are {len(devices)}")
    grid = np.array(devices[:count]).reshape(sizes["data"], sizes["model"])
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
    if _without_spare_threads(mesh):
        log.warning(
            "%d virtual CPU devices with as few threads can make wrong images: set NPROC=%d",
            mesh.size,
            2 * mesh.size,
        )
    return mesh


def _without_spare_threads(mesh: Mesh) -> bool:
    """Whether XLA may compute wrongly here: measured with jaxlib 0.10.2, on two cores.

    With two virtual devices and two threads the first of each device's images came out wrong, now
    and then or always, in a program whose parts each gave the same every time; with four threads
    or eight all were right. A single device is not concerned.
    """
    return not may_run_ahead(mesh) and _threads() <= mesh.size


def may_run_ahead(mesh: Mesh) -> bool:
    """Whether a program may be started before the last one has finished.

    XLA's virtual CPU devices share one pool of threads: with two programs under way, the
    all-reduces of each can wait for threads that the other holds, for ever.
    """
    return mesh.size == 1 or mesh.devices.flat[0].platform != "cpu"


def hardware(mesh: Mesh) -> str:
    """What decides a program's last bits: the kind of device; of a CPU, XLA's threads too.

    XLA parts sums among as many threads as there are cores (or virtual devices, if those are more)
    unless NPROC says how many.
    """
    first = mesh.devices.flat[0]
    if first.platform != "cpu":
        return first.device_kind
    return f"{first.device_kind}, {_threads()} threads"


def _threads() -> int:
    """How many threads XLA computes with on CPUs."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    cores = len(affinity(0)) if affinity else os.cpu_count()
    said = (os.environ.get(name, "") for name in ("PJRT_NPROC", "NPROC"))
    threads = next((int(text) for text in said if re.fullmatch(r"[1-9][0-9]{0,5}", text)), cores)
    return max(threads, jax.local_device_count())


def _sizes(spec: str) -> dict[str, int]:
    sizes = {}
    for part in spec.split(","):
        match = re.fullmatch(r"(data|model)=([1-9][0-9]{0,5})", part.strip())
        if match is None or match[1] in sizes:
            raise InputError(f"--mesh {spec}: write it as data=4 or data=4,model=2")
        sizes[match[1]] = int(match[2])
    return {"data": 1, "model": 1, **sizes}


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits an array's axis, the first unless `axis` names another, over `data`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def over_data(function: Callable, mesh: Mesh, axes: Sequence[int | None]) -> Callable:
    """The function that lets each device of `data` call `function` on its own part of a batch.

    What one device computes of its part is what a lone device would, and nothing is exchanged over
    `data`, by construction; over `model` XLA splits and exchanges as ever.

    Args:
      function: of trees of arrays, to trees of arrays [part, ...].
      axes: for each argument, which axis of its arrays is the batch; None gives it whole to all. If
        all are None, each device of `data` computes the same, and the result is not split either.
    """

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(spec, axes)),
        out_specs=PartitionSpec() if set(axes) == {None} else PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def fully_sharded(mesh: Mesh, shapes: dict) -> dict:
    """Shardings that split each array over `data` too, as training does with what it keeps.

    Of each array the largest axis that the devices divide is split; an array without one is copied.
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


def parameter_shardings(mesh: Mesh, shapes: dict) -> dict:
    """The sharding of each parameter, by `PARAMETER_RULES`.

    Args:
      shapes: nested dict of anything with a `.shape`.

    Raises:
      InputError: if `model` divides no parameter that it should, so that nothing would be split.
    """
    parts = mesh.shape["model"]

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        axes = (axis for pattern, axis in PARAMETER_RULES if re.search(pattern, name))
        axis = next(axes, None)
        if axis is None or leaf.shape[axis] % parts:
            return replicated(mesh)
        after = [None] * (-1 - axis)
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim + axis), "model", *after))

    shardings = jax.tree_util.tree_map_with_path(sharding, shapes)
    if all(found.is_fully_replicated for found in jax.tree.leaves(shardings)) and parts > 1:
        raise InputError(
            f"--mesh model={parts}: divides none of this model's widths; take a power of 2"
        )
    return shardings
