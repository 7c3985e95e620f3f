"""Builds optimizers by name: clipping, direction, weight decay, then the learning rate."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxdiff.training.recipe import Average, Optimizer

# Ends of the names of what is added to tokens or modulations: positions, shifts and padding.
TABLES = ("pos_embed", "scale_shift_table", "pad_token")
ADAMS_SIZE = 0.2  # RMS of Adam's updates; Muon's are scaled to match


def optimizer(
    config: Optimizer, steps: int
) -> tuple[optax.GradientTransformation, Callable[[int], float]]:
    """Returns the update rule for nested dicts of parameters, and the learning rate by step.

    Clipping and weight decay (decoupled from the gradient: Loshchilov and Hutter, 2019,
    arXiv:1711.05101) are the same for all optimizers, so changing the name changes nothing else.

    Args:
      config: the recipe's optimizer. `accumulate` is not handled here.
      steps: the total number of updates, after which the cosine reaches zero.
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
    """Returns the decay of the averaged weights at `step`, counted from 0; may be traced."""
    if config.relative_width:  # Karras et al., 2024, arXiv:2312.02696, equations 1 and 2
        return (1.0 - 1.0 / (step + 1.0)) ** (_power(config.relative_width) + 1.0)
    return jnp.minimum(config.decay, (1.0 + step) / (10.0 + step))


def _power(relative_width: float) -> float:
    """Solves (γ + 1)^½ (γ + 2)^-1 (γ + 3)^-½ = `relative_width` for γ, a cubic's largest root."""
    inverse = relative_width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def _schedule(config: Optimizer, steps: int) -> Callable[[int], float]:
    highest = config.learning_rate
    if config.schedule == "constant":  # before the cool-down, the rate does not depend on `steps`
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
        case "muon":  # Jordan, 2024; scale of updates: Liu et al., 2025, arXiv:2502.16982, 2.2
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
    """Marks kernels and embeddings True; biases, the scales of norms and tables False.

    A table of positions must not change, and has no gradient either.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and not _name(path).endswith(TABLES), params
    )


def _learns_by(params: dict) -> dict:
    """Labels kernels "muon", and what multiplies nothing "adam": vectors, embeddings, tables."""

    def label(path, leaf) -> str:
        is_kernel = leaf.ndim > 1 and not _name(path).endswith(("embedding", *TABLES))
        return "muon" if is_kernel else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _matrix_axes(params: dict) -> dict:
    """Views a kernel as a matrix from its inputs (HWI for a convolution) to its outputs."""

    def axes(leaf) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map(axes, params)


def _with_adams_size(update: Array) -> Array:
    inputs, outputs = math.prod(update.shape[:-1]), update.shape[-1]
    return ADAMS_SIZE * jnp.sqrt(max(inputs, outputs)) * update
