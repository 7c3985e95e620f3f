"""The training loop: one jitted step, checkpoints that survive a kill, and pictures on the way.

It knows optimization and files; what is learned comes in as a `Task`. A batch is a function of the
seed and the step, so resuming needs the step's number and nothing else.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from PIL import Image
from tqdm import tqdm

from jaxdiff import compilation, parallel
from jaxdiff.training.optimizers import optimizer
from jaxdiff.training.recipe import Recipe

Params = Any  # a nested dict of arrays
LOG_EVERY = 50


@dataclass(frozen=True)
class Task:
    """What one objective gives to the loop.

    Attributes:
      params: what is trained, a nested dict of float32 arrays.
      frozen: what the loss needs beside it and nothing changes, a nested dict of arrays.
      loss: (params, frozen, batch, key) to a scalar, and a dict of what to log: scalars, and
        perhaps "by_noise_level", float32 [2, levels]: summed losses, and how many they are.
      batch: step number to a dict of NumPy arrays; the same for the same step, on any thread.
      validation: such batches of what is never trained on; may be empty.
      preview: (params, frozen) to a picture, uint8 [height, width, 3].
      export: (params, frozen, directory): writes the trained model for others to load.
    """

    params: Params
    frozen: Params
    loss: Callable[[Params, Params, dict, Array], tuple[Array, dict]]
    batch: Callable[[int], dict]
    validation: Sequence[dict]
    preview: Callable[[Params, Params], np.ndarray]
    export: Callable[[Params, Params, Path], None]


def fit(task: Task, recipe: Recipe, output: Path) -> None:
    """Trains until `recipe.steps`, continuing from the newest checkpoint in `output`.

    Writes checkpoints/, metrics.jsonl, loss.png, samples/NNNNNN.png and, at the end, model/.
    """
    transform, _ = optimizer(recipe.optimizer, recipe.steps)
    step_fn = _compile_step(task, transform, recipe)
    devices = math.gcd(recipe.batch_size, jax.local_device_count())
    mesh = parallel.make_mesh(f"data={devices}")
    state = {
        "params": task.params,
        "ema": jax.tree.map(jnp.copy, task.params),  # donated beside them, so not the same buffers
        "optimizer": transform.init(task.params),
    }
    state, frozen = jax.device_put((state, task.frozen), parallel.replicated(mesh))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((output / "checkpoints").absolute(), options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
        log = _Log(output, start)
        with ThreadPoolExecutor(1) as pool:  # renders the next batch while the device computes
            upcoming = pool.submit(task.batch, start)
            progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps)
            for step in progress:
                batch = jax.device_put(upcoming.result(), parallel.batch_sharding(mesh))
                upcoming = pool.submit(task.batch, step + 1)
                state, metrics = step_fn(state, frozen, batch, step)
                if not parallel.may_run_ahead(mesh):
                    jax.block_until_ready(metrics)
                log.add(step + 1, metrics, recipe.batch_size, progress)
                done = step + 1
                if done % recipe.checkpoints.every == 0 or done == recipe.steps:
                    manager.save(done, args=ocp.args.StandardSave(state))
                    log.draw()
                    samples = output / "samples"
                    samples.mkdir(exist_ok=True)
                    Image.fromarray(task.preview(state["ema"], frozen)).save(
                        samples / f"{done:06d}.png"
                    )
    task.export(state["ema"], frozen, output / "model")


def _compile_step(task: Task, transform: optax.GradientTransformation, recipe: Recipe):
    root = jax.random.key(recipe.seed)

    def step_fn(state, frozen, batch, step):
        grad_fn = jax.value_and_grad(task.loss, has_aux=True)
        key = jax.random.fold_in(root, step)
        (loss, metrics), grads = grad_fn(state["params"], frozen, batch, key)
        updates, optimizer_state = transform.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        # The average must not remember the random start: its memory grows with the step.
        decay = jnp.minimum(recipe.average.decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state["ema"], params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **metrics}
        return {"params": params, "ema": ema, "optimizer": optimizer_state}, metrics

    return compilation.jit(step_fn, donate_argnums=0)


class _Log:
    """metrics.jsonl and loss.png. On resuming, lines from after the checkpoint are dropped."""

    def __init__(self, output: Path, start: int):
        self.path = output / "metrics.jsonl"
        self.curve = output / "loss.png"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= start]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.pending: list[dict] = []
        self.since = time.monotonic()

    def add(self, step: int, metrics: dict, batch_size: int, progress: tqdm) -> None:
        """Keeps a step's metrics on the device; every `LOG_EVERY` steps writes their means."""
        self.pending.append(metrics)
        if step % LOG_EVERY:
            return
        count = len(self.pending)
        means = {name: float(sum(m[name] for m in self.pending)) / count for name in metrics}
        rate = count * batch_size / (time.monotonic() - self.since)
        self.rows.append({"step": step, **means, "images_per_second": rate})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        progress.set_postfix(loss=f"{means['loss']:.4f}", images_per_second=f"{rate:.0f}")
        self.pending, self.since = [], time.monotonic()

    def draw(self) -> None:
        """Draws the loss against the step."""
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(7, 4), layout="tight")).subplots()
        axes.plot([row["step"] for row in self.rows], [row["loss"] for row in self.rows])
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        figure.savefig(self.curve, dpi=100)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [n, h, w, 3] to one picture, row by row, `columns` wide with 2 px between."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    return sheet
