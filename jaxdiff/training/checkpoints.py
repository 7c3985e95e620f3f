"""Orbax checkpoints, written asynchronously and kept by recency and validation loss.

A checkpoint is renamed into place when complete and renamed away before deletion, so every visible
checkpoint can be restored, no matter when the process is killed.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxdiff.errors import InputError
from jaxdiff.training.recipe import Checkpoints

DELETED = "deleted"  # the folder of checkpoints that are being deleted


@contextlib.contextmanager
def opened(
    directory: Path, config: Checkpoints, *, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Opens the checkpoints in `directory`; on exit, waits for pending writes.

    Raises:
      OSError: naming the directory, if a checkpoint cannot be written.
    """
    if not read_only:
        shutil.rmtree(directory / DELETED, ignore_errors=True)
    best = checkpoint_managers.BestN(
        n=config.keep_best,
        get_metric_fn=_validation_loss,
        reverse=True,
        keep_checkpoints_without_metrics=False,
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=_validation_loss,
        best_mode="min",
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(config.keep), best]
        ),
        todelete_subdir=DELETED,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    with _failures_named(directory):
        manager = ocp.CheckpointManager(directory.absolute(), options=options)
    try:
        yield manager
    finally:
        with _failures_named(directory):
            manager.close()
        if not read_only:
            shutil.rmtree(directory / DELETED, ignore_errors=True)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: dict,
    window: list[dict],
    validation_loss: float | None,
) -> None:
    """Starts writing a checkpoint; `state` may be donated once this returns.

    Args:
      step: the number of updates so far.
      state: a nested dict of arrays.
      window: the measurements since the last line of the metrics.
      validation_loss: determines the best checkpoints; None if it was not measured.
    """
    directory = Path(manager.directory)
    with _failures_named(directory):
        manager.wait_until_finished()
        shutil.rmtree(directory / DELETED, ignore_errors=True)
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), window=ocp.args.JsonSave({"steps": window})
            ),
            metrics=None if validation_loss is None else {"validation_loss": validation_loss},
        )


def restore(manager: ocp.CheckpointManager, step: int, like: dict) -> tuple[dict, list[dict]]:
    """Restores the state and the window that `save` wrote.

    Args:
      step: the step of one of the manager's checkpoints.
      like: the state as `jax.ShapeDtypeStruct`s with the desired shardings, which may differ from
        those at saving.

    Raises:
      InputError: if the checkpoint does not match `like`.
    """
    composite = ocp.args.Composite(
        state=ocp.args.StandardRestore(like), window=ocp.args.JsonRestore()
    )
    try:
        restored = manager.restore(step, args=composite)
    except (ValueError, KeyError, FileNotFoundError) as problem:
        raise InputError(
            f"{manager.directory / str(step)}: not a checkpoint of this recipe's networks and "
            f"optimizer ({_first_line(problem)}); remove it or choose another --output"
        ) from None
    return restored["state"], restored["window"]["steps"]


def find(manager: ocp.CheckpointManager, which: str) -> int:
    """Returns the step of the checkpoint given by "last", "best" or a step number.

    Raises:
      InputError: if the checkpoint does not exist.
    """
    steps = sorted(manager.all_steps())
    if which == "last" and steps:
        return steps[-1]
    if which == "best" and manager.best_step() is not None:
        return manager.best_step()
    if which in map(str, steps):
        return int(which)
    there = ", ".join(map(str, steps)) or "none yet"
    raise InputError(
        f"--export {which}: checkpoint not found in {manager.directory}; use last, best (if a "
        f"validation loss is measured) or one of these steps: {there}"
    )


def abstract(shapes: dict, shardings: dict) -> dict:
    """Combines `shapes` and `shardings` for `restore`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def _validation_loss(metrics: dict[str, Any]) -> float:
    return metrics["validation_loss"]


@contextlib.contextmanager
def _failures_named(directory: Path) -> Iterator[None]:
    """Converts the writers' various exceptions into an OSError that names the directory."""
    try:
        yield
    except Exception as problem:
        # TensorStore raises various exceptions, but includes the system error code in the text.
        found = re.search(r"os_error_code='(\d+)'", str(problem))
        code = int(found[1]) if found else getattr(problem, "errno", None) or errno.EIO
        what = os.strerror(code) if code != errno.EIO else _first_line(problem)
        raise OSError(code, f"cannot write a checkpoint: {what}", str(directory)) from None


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:300]
