"""Orbax checkpoints: written while training goes on, kept by count and by validation loss.

A checkpoint gets its name when it is whole and loses it before it is deleted, so that one that can
be seen can be restored, whenever the process is killed.
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

DELETED = "deleted"  # the folder of those that are on their way out


@contextlib.contextmanager
def opened(
    directory: Path, config: Checkpoints, *, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in `directory`; on leaving, waits for the one that is being written.

    Raises:
      OSError: naming the directory, if one could not be written.
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
    """Begins to write a checkpoint; `state` may be donated once this returns.

    Args:
      step: how many updates have made the state.
      state: nested dict of arrays.
      window: what has been measured since the last line of the metrics.
      validation_loss: by which the best are kept; None if it was not measured.
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
    """What was given to `save`: the state and the window.

    Args:
      step: of one of the manager's checkpoints.
      like: the state as `jax.ShapeDtypeStruct`s, with the shardings that it shall have, whatever
        they were when it was saved.

    Raises:
      InputError: if the checkpoint holds something else.
    """
    composite = ocp.args.Composite(
        state=ocp.args.StandardRestore(like), window=ocp.args.JsonRestore()
    )
    try:
        restored = manager.restore(step, args=composite)
    except (ValueError, KeyError, FileNotFoundError) as problem:
        raise InputError(
            f"{manager.directory / str(step)}: not a checkpoint of this recipe's networks and "
            f"optimizer ({_first_line(problem)}); remove it, or name another --output"
        ) from None
    return restored["state"], restored["window"]["steps"]


def find(manager: ocp.CheckpointManager, which: str) -> int:
    """The step that "last", "best" or a number names.

    Raises:
      InputError: if there is no such checkpoint.
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
        f"--export {which}: {manager.directory} has no such checkpoint; name last, best (where "
        f"a validation loss is measured) or one of these steps: {there}"
    )


def abstract(shapes: dict, shardings: dict) -> dict:
    """`shapes` with `shardings`, for `restore`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def _validation_loss(metrics: dict[str, Any]) -> float:
    return metrics["validation_loss"]


@contextlib.contextmanager
def _failures_named(directory: Path) -> Iterator[None]:
    """Turns what the writers raise, each in its own way, into an error that names the directory."""
    try:
        yield
    except Exception as problem:
        # TensorStore raises what it likes, but tells the operating system's error in the text.
        told = re.search(r"os_error_code='(\d+)'", str(problem))
        code = int(told[1]) if told else getattr(problem, "errno", None) or errno.EIO
        what = os.strerror(code) if code != errno.EIO else _first_line(problem)
        raise OSError(code, f"a checkpoint could not be written: {what}", str(directory)) from None


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:300]
