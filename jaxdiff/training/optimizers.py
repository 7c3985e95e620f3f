"""Optimizers by name. All take the same steps: clip, direct, decay, scale by the learning rate."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxdiff.training.recipe import Average, Optimizer

ADAMS_SIZE = 0.2  # of a value's update by Adam, root mean square; Muon's are brought to the same


def optimizer(
    config: Optimizer, steps: int
) -> tuple[optax.GradientTransformation, Callable[[int], float]]:
    """The update rule for nested dicts of parameters, and its learning rate by step.

    Clipping and decay are the same for all (decay decoupled from the gradient: Loshchilov and
    Hutter, 2019, arXiv:1711.05101), so that recipes differ in the name alone.

    Args:
      config: of the recipe. Its `accumulate` is not done here.
      steps: how many updates there are; where the cosine reaches zero.
    """
    schedule = _schedule(config, steps)
    transform = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(schedule),
    )
    return transform, schedule


def average_decay(config: Average, step: int | Array) -> float | Array:
    """How much of the averaged weights stays at `step`, counted from 0, which may be traced."""
    if config.relative_width:  # Karras et al., 2024, arXiv:2312.02696, equations 1 and 2
        return (1.0 - 1.0 / (step + 1.0)) ** (_power(config.relative_width) + 1.0)
    return jnp.minimum(config.decay, (1.0 + step) / (10.0 + step))


def _power(relative_width: float) -> float:
    """γ for a relative width of (γ + 1)^½ (γ + 2)^-1 (γ + 3)^-½: the cubic's greatest root."""
    inverse = relative_width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def _schedule(config: Optimizer, steps: int) -> Callable[[int], float]:
    highest = config.learning_rate
    if config.schedule == "constant":  # before the cool-down no rate depends on `steps`
        growth = optax.linear_schedule(0.0, highest, config.warmup_steps)
        cooldown = optax.linear_schedule(highest, 0.0, config.cooldown_steps)
        parts = [growth, optax.constant_schedule(highest), cooldown]
        return optax.join_schedules(parts, [config.warmup_steps, steps - config.cooldown_steps])
    warmup_steps = min(config.warmup_steps, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, highest, warmup_steps, steps)


def _direction(config: Optimizer) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    match config.name:
        case "adamw":
            return adam
        case "adafactor":  # Shazeer and Stern, 2018, arXiv:1804.04235, without relative steps
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        case "lion":  # Chen et al., 2023, arXiv:2302.06675
            return optax.scale_by_lion(config.beta1, config.beta2)
        case "muon":  # Jordan, 2024; sizes of updates: Liu et al., 2025, arXiv:2502.16982, 2.2
            muon = optax.chain(
                optax.contrib.scale_by_muon(
                    beta=config.beta1, weight_dimension_numbers=_matrix_axes
                ),
                optax.stateless(lambda updates, params: jax.tree.map(_with_adams_size, updates)),
            )
            return optax.partition({"muon": muon, "adam": adam}, _learns_by)
        case "sgd":
            return optax.trace(config.beta1)


def _decays(params: dict) -> dict:
    """Whether a parameter is a kernel or an embedding, not a bias or a norm's scale."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _learns_by(params: dict) -> dict:
    """ "muon" for kernels; "adam" for vectors and embeddings, which multiply nothing."""

    def label(path, leaf) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return "muon" if leaf.ndim > 1 and not name.endswith("embedding") else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _matrix_axes(params: dict) -> dict:
    """A kernel as a matrix from all its inputs (a convolution's HWI too) to its outputs."""

    def axes(leaf) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map(axes, params)


def _with_adams_size(update: Array) -> Array:
    inputs, outputs = math.prod(update.shape[:-1]), update.shape[-1]
    return ADAMS_SIZE * jnp.sqrt(max(inputs, outputs)) * update
