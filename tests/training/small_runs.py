"""A training task that compiles in a second, and processes that run it and can be killed.

The processes are forked from one that has imported everything but has not started JAX.
"""

import json
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure  # noqa: F401 - imported once, before the processes are forked
import numpy as np

from jaxdiff.training import loop
from jaxdiff.training.recipe import AutoencoderRecipe, Checkpoints, Computing, Optimizer

WIDTH, LEVELS = 256, 4
RECIPE = AutoencoderRecipe(
    objective="autoencoder",
    steps=60,
    batch_size=4,
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="constant"),
    checkpoints=Checkpoints(every=20, keep=1),
    vae={},
)
SHARDED = replace(RECIPE, computing=Computing(shard=True))
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["small_runs"])


def draw(seed: int, number: int, count: int = 4) -> dict:
    rng = np.random.default_rng([seed, number])
    inputs = rng.normal(size=(count, WIDTH)).astype(np.float32)
    return {"inputs": inputs, "wanted": np.roll(inputs, 1, axis=1)}


def task(batch=lambda number: draw(1, number), noise_scale: float = 0.1) -> loop.Task:
    """Makes a task that learns to shift the values of a noisy vector by one place."""

    def loss(params, frozen, batch, key):
        noise = frozen["scale"] * jax.random.normal(key, batch["inputs"].shape)
        outputs = (batch["inputs"] + noise) @ params["kernel"] + params["bias"]
        errors = jnp.mean((outputs - batch["wanted"]) ** 2, axis=1)
        levels = jax.nn.one_hot(jnp.arange(len(errors)) % LEVELS, LEVELS)
        by_noise_level = jnp.stack([errors @ levels, levels.sum(0)])
        return jnp.mean(errors), {"by_noise_level": by_noise_level}

    def preview(params, frozen) -> np.ndarray:
        picture = np.clip(128 + 500 * np.asarray(params["kernel"])[:48, :48], 0, 255)
        return np.repeat(picture.astype(np.uint8)[..., None], 3, axis=2)

    def export(params, frozen, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        np.savez(directory / "weights.npz", **params)

    return loop.Task(
        params={"kernel": jnp.zeros((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)},
        frozen={"scale": jnp.float32(noise_scale)},
        loss=loss,
        batch=batch,
        validation=[draw(2, 0), draw(2, 1)],
        preview=preview,
        export=export,
    )


def weights(output: Path) -> dict[str, np.ndarray]:
    with np.load(output / "model" / "weights.npz") as stored:
        return dict(stored)


def lines(output: Path) -> list[dict]:
    """Returns the metrics without those that depend on time."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def start(recipe, output: Path, devices: int = 1) -> multiprocessing.Process:
    """Starts a process that trains into `output` and exits with the command's code."""
    process = PROCESSES.Process(target=_run, args=(recipe, output, devices))
    process.start()
    return process


def finish(recipe, output: Path, devices: int = 1) -> None:
    """Trains to the end in a new process."""
    process = start(recipe, output, devices)
    process.join(120)
    assert process.exitcode == 0


def _run(recipe, output: Path, devices: int) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    output.mkdir(exist_ok=True)
    sys.exit(0 if loop.fit(task(), recipe, output) else 75)
