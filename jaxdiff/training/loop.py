"""The training loop: jitted steps, checkpoints that survive a kill, and sample grids.

The loop handles optimization and files; a `Task` defines what is trained. A batch depends only on
its number, so a run resumes from its step number alone.
"""

import contextlib
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jaxdiff.devices import compilation, parallel
from jaxdiff.errors import InputError
from jaxdiff.images import sheet
from jaxdiff.training import checkpoints, watch
from jaxdiff.training.optimizers import average_decay, optimizer
from jaxdiff.training.recipe import Recipe

Params = Any  # a nested dict of arrays
MOST_LOADERS = 8  # threads that prefetch batches, one batch each
VALIDATION_SEED = 2**31 - 1
LEAST_PX = 160  # of a picture in a grid with captions, which smaller ones are too narrow for


@dataclass(frozen=True)
class Task:
    """The interface between a training objective and the loop.

    Attributes:
      params: the parameters to train, a nested dict of float32 arrays.
      frozen: the other arrays that the loss needs, a nested dict; never changed.
      loss: maps (params, frozen, batch, key) to a scalar and a dict of metrics: scalars, and
        optionally "by_noise_level", float32 [2, levels]: sums and counts of losses.
      batch: maps a number, counted from 0 over the whole run, to a dict of NumPy arrays
        [batch, ...]; deterministic and thread-safe.
      validation: batches of the same size that are never trained on; may be empty.
      preview: maps (params, frozen) to a sample grid, uint8 [height, width, 3].
      export: called with (params, frozen, directory); writes the trained model.
      validated_by: the metric whose mean is the validation loss; None for the loss itself.
    """

    params: Params
    frozen: Params
    loss: Callable[[Params, Params, dict, Array], tuple[Array, dict]]
    batch: Callable[[int], dict]
    validation: Sequence[dict]
    preview: Callable[[Params, Params], np.ndarray]
    export: Callable[[Params, Params, Path], None]
    validated_by: str | None = None


class Interrupted(Exception):
    """Training cannot continue; its checkpoints are kept.

    The message is one line with the step and the remedy.
    """


def fit(task: Task, recipe: Recipe, output: Path) -> bool:
    """Trains up to `recipe.steps`, resuming from the newest checkpoint in `output`.

    Writes checkpoints/, metrics.jsonl, tensorboard/, loss.png, noise_levels.png (if the task
    reports losses by noise level), samples/NNNNNN.png and, at the end, model/.

    Returns:
      True if training finished; False if SIGTERM stopped it. It then saved a checkpoint and can be
      resumed.

    Raises:
      Interrupted: at the first loss or gradient that is not finite, or if a batch cannot be read.
        The last checkpoint is from before that step.
      InputError: if the newest checkpoint does not fit the recipe.
      OSError: if a file cannot be written.
    """
    run = _prepare(task, recipe)
    with (
        _stopped_by_sigterm() as stopped,
        checkpoints.opened(output / "checkpoints", recipe.checkpoints) as manager,
    ):
        state, start, window = _begin(run, manager)
        watched = watch.Watch(output, start, recipe.steps, window)
        with contextlib.closing(watched.progress):
            state, done = _train(run, manager, watched, state, start, stopped)
    if done < recipe.steps:
        return False
    task.export(state["ema"], run.frozen, output / "model")
    return True


def export(task: Task, recipe: Recipe, output: Path, which: str, to: Path | None) -> Path:
    """Exports the averaged weights of a checkpoint in `output` as a model.

    Args:
      which: "last", "best" or a step number.
      to: the directory to create, with its parents; by default `output`/model-NNNNNN, where NNNNNN
        is the step.

    Returns:
      the directory.

    Raises:
      InputError: if the checkpoint does not exist or does not fit the recipe.
    """
    run = _prepare(task, recipe)
    folder = output / "checkpoints"
    with checkpoints.opened(folder, recipe.checkpoints, read_only=True) as manager:
        step = checkpoints.find(manager, which)
        state, _ = checkpoints.restore(manager, step, run.state)
    directory = to or output / f"model-{step:06d}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    task.export(state["ema"], run.frozen, directory)
    return directory


@dataclass(frozen=True)
class _Run:
    """The constants of a run: shardings and compiled functions.

    Attributes:
      state: `jax.ShapeDtypeStruct`s with shardings for "params", their average "ema" and
        "optimizer".
      frozen: the task's frozen arrays, on the devices.
      batch: the sharding of batches.
      initial: maps params to the initial state.
      gradients: maps (params, frozen, batch, batch number) to the gradients and the loss's metrics.
      add: adds gradients.
      update: maps (state, sum of gradients, step) to the next state and the update's metrics.
      evaluate: maps (params, frozen, batch, key) to the validation loss.
    """

    task: Task
    recipe: Recipe
    state: dict
    frozen: Params
    batch: NamedSharding
    initial: Callable[[Params], dict]
    gradients: Callable[[Params, Params, dict, int], tuple[Params, dict]]
    add: Callable[[Params, Params], Params]
    update: Callable[[dict, Params, int], tuple[dict, dict]]
    evaluate: Callable[[Params, Params, dict, Array], Array]


def _prepare(task: Task, recipe: Recipe) -> _Run:
    mesh = parallel.make_mesh(f"data={math.gcd(recipe.batch_size, jax.local_device_count())}")
    transform, learning_rate = optimizer(recipe.optimizer, recipe.steps)
    root = jax.random.key(recipe.seed)

    def initial(params: Params) -> dict:  # copies, because the state will be donated
        copies = {name: jax.tree.map(jnp.copy, params) for name in ("params", "ema")}
        return {**copies, "optimizer": transform.init(params)}

    def gradients(params: Params, frozen: Params, batch: dict, number: int):
        key = jax.random.fold_in(root, number)
        function = jax.value_and_grad(task.loss, has_aux=True)
        (loss, logged), found = function(params, frozen, batch, key)
        return found, {"loss": loss, **logged}

    def update(state: dict, total: Params, step: int):
        mean = jax.tree.map(lambda leaf: leaf / recipe.optimizer.accumulate, total)
        updates, optimizer_state = transform.update(mean, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = average_decay(recipe.average, step)
        ema = jax.tree.map(lambda old, new: new + decay * (old - new), state["ema"], params)
        logged = {"gradient_norm": optax.tree.norm(mean), "learning_rate": learning_rate(step)}
        return {"params": params, "ema": ema, "optimizer": optimizer_state}, logged

    def evaluate(*arguments) -> Array:
        loss, logged = task.loss(*arguments)
        return loss if task.validated_by is None else logged[task.validated_by]

    def jit(function: Callable, **how) -> Callable:
        program = compilation.jit(function, **how)
        if parallel.may_run_ahead(mesh):
            return program
        return lambda *arguments: jax.block_until_ready(program(*arguments))

    shapes = jax.eval_shape(initial, task.params)
    where = _shardings(mesh, recipe, shapes)
    return _Run(
        task=task,
        recipe=recipe,
        state=checkpoints.abstract(shapes, where),
        frozen=jax.device_put(task.frozen, _shardings(mesh, recipe, task.frozen)),
        batch=parallel.batch_sharding(mesh),
        initial=jit(initial, out_shardings=where),
        gradients=jit(gradients, out_shardings=(where["params"], None)),
        add=jit(lambda *trees: jax.tree.map(jnp.add, *trees), donate_argnums=0),
        update=jit(update, out_shardings=(where, None), donate_argnums=0),
        evaluate=jit(evaluate),
    )


def _shardings(mesh: Mesh, recipe: Recipe, shapes: dict) -> dict:
    if recipe.computing.shard:
        return parallel.fully_sharded(mesh, shapes)
    return jax.tree.map(lambda _: parallel.replicated(mesh), shapes)


def _begin(run: _Run, manager: ocp.CheckpointManager) -> tuple[dict, int, list[dict]]:
    """Returns state, step and window of the newest checkpoint, or the initial ones."""
    start = manager.latest_step() or 0
    if not start:
        return run.initial(run.task.params), 0, []
    state, window = checkpoints.restore(manager, start, run.state)
    return state, start, window


def _train(
    run: _Run,
    manager: ocp.CheckpointManager,
    watched: watch.Watch,
    state: dict,
    start: int,
    stopped: threading.Event,
) -> tuple[dict, int]:
    """Runs the steps from `start` on; returns the final state and the number of steps done."""
    done, unread = start, deque()  # metrics that the devices may still be computing
    with _loaded(run, start) as batches:
        for done in range(start + 1, run.recipe.steps + 1):
            state, logged = _step(run, state, batches, done - 1)
            unread.append((done, logged))
            due, leaving = _is_due(run.recipe, done), stopped.is_set()
            while len(unread) > (0 if due or leaving else 1):
                _read(run, manager, watched, *unread.popleft())
            if due:
                validation = _validate(run, state["ema"])
                _check_finite(run, manager, done, validation)
                watched.write_line(done, validation)
                checkpoints.save(manager, done, state, [], validation.get("validation_loss"))
                watched.show(done, run.task.preview(state["ema"], run.frozen))
            elif leaving:
                checkpoints.save(manager, done, state, watched.window, None)
            if leaving:
                break
    return state, done


def _is_due(recipe: Recipe, done: int) -> bool:
    """Returns whether a checkpoint, a validation and a sample grid are due."""
    return done % recipe.checkpoints.every == 0 or done == recipe.steps


def _step(run: _Run, state: dict, batches: Iterator[dict], step: int) -> tuple[dict, tuple]:
    """Updates the state by the mean gradient of `accumulate` batches; also returns the metrics."""
    count = run.recipe.optimizer.accumulate
    total, logged = None, []
    for number in range(step * count, (step + 1) * count):
        try:
            batch = jax.device_put(next(batches), run.batch)
        except InputError as problem:
            mend = "fix this, then run the same command again"
            raise Interrupted(f"step {step + 1}: {problem}; {mend}") from problem
        found, of_batch = run.gradients(state["params"], run.frozen, batch, number)
        total = found if total is None else run.add(total, found)
        logged.append(of_batch)
    state, of_update = run.update(state, total, step)
    return state, (logged, of_update)


def _read(run: _Run, manager: ocp.CheckpointManager, watched: watch.Watch, step: int, logged):
    """Waits for the metrics of a step, checks and records them."""
    measured = watch.measurements(*logged)
    _check_finite(run, manager, step, measured)
    watched.add(measured, run.recipe.batch_size * run.recipe.optimizer.accumulate)
    if watch.is_logged(step) and not _is_due(run.recipe, step):
        watched.write_line(step, {})


def _validate(run: _Run, params: Params) -> dict[str, float]:
    """Computes the mean loss over the validation batches, with the same noise at every call."""
    root = jax.random.key(VALIDATION_SEED)
    losses = []
    for number, batch in enumerate(run.task.validation):
        batch = jax.device_put(batch, run.batch)
        losses.append(run.evaluate(params, run.frozen, batch, jax.random.fold_in(root, number)))
    if not losses:
        return {}
    return {"validation_loss": float(np.mean([np.float64(loss) for loss in losses]))}


def _check_finite(run: _Run, manager: ocp.CheckpointManager, step: int, measured: dict) -> None:
    names = ("loss", "gradient_norm", "validation_loss")
    wrong = [name for name in names if not math.isfinite(measured.get(name, 0.0))]
    if not wrong:
        return
    count = run.recipe.optimizer.accumulate
    first, last = (step - 1) * count, step * count - 1
    batches = f"batch {first}" if first == last else f"batches {first} to {last}"
    kept = manager.latest_step()
    kept = f"the last checkpoint is from step {kept}" if kept else "there is no checkpoint yet"
    what = f"the {wrong[0].replace('_', ' ')} is {measured[wrong[0]]}"
    mend = "Lower optimizer.learning_rate and train into another --output"
    if wrong[0] == "validation_loss":
        raise Interrupted(f"step {step}: {what}; {kept}. {mend}")
    mend += ", or remove the examples of that batch if they are at fault"
    raise Interrupted(f"step {step}, {batches}: {what}; {kept}. {mend}")


@contextlib.contextmanager
def _loaded(run: _Run, start: int) -> Iterator[Iterator[dict]]:
    """Yields an iterator over the batches from step `start` on, prefetched by threads."""
    count, threads = run.recipe.optimizer.accumulate, min(MOST_LOADERS, os.cpu_count() or 1)
    if start >= run.recipe.steps:
        yield iter(())
        return
    numbers = grain.MapDataset.range(start * count, run.recipe.steps * count)
    batches = numbers.map(run.task.batch).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    with contextlib.closing(iter(batches)) as loaded:
        yield loaded


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets; a second SIGTERM ends the process immediately."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number, _) -> None:
        os.write(2, b"\njaxdiff: saving after the current step\n")  # print is not reentrant
        stopped.set()
        signal.signal(number, old)

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, old)


def captioned(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Arranges images, uint8 [n, h, w, 3], in rows of 8 with a caption under each."""
    px = max(LEAST_PX, images.shape[2])
    return np.asarray(sheet.draw(images, captions, 8, px))


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arranges images, uint8 [n, h, w, 3], row by row in `columns` columns with 2 px gaps."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    return sheet
