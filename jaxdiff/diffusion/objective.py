"""What the network predicts and how x_0 is recovered from it; only this module knows.

The prediction types are "epsilon" (Ho et al., 2020, arXiv:2006.11239), "v_prediction" (Salimans and
Ho, 2022, arXiv:2202.00512, appendix D), "sample", which is x_0 itself, and "flow" (Lipman et al.,
2023, arXiv:2210.02747), the velocity eps - x_0 where alpha = 1 - sigma.
"""

import jax.numpy as jnp
from jax import Array

from jaxdiff.diffusion.schedule import Clamp


def noisy(x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """Applies the forward process, x_t = alpha x_0 + sigma eps (Ho et al., 2020, equation 4)."""
    return alpha * x0 + sigma * noise


def target(x0: Array, noise: Array, alpha: Array, sigma: Array, prediction_type: str) -> Array:
    """Returns what the network is trained to predict from `noisy(...)`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow":
        return noise - x0
    return alpha * noise - sigma * x0


def to_x0(output: Array, x: Array, alpha: Array, sigma: Array, prediction_type: str) -> Array:
    """Converts the network's output for the input `x` to an estimate of x_0."""
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "flow":
        return x - sigma * output
    return alpha * x - sigma * output


def clamped(x0: Array, clamp: Clamp) -> Array:
    """Clips estimates of x_0, float32 [batch, ...], or thresholds each image dynamically.

    A dynamic threshold s is a quantile of the image's magnitudes, at least 1 and at most the limit.
    The image is clipped to -s..s and divided by s (Saharia et al., 2022, arXiv:2205.11487, 2.3).

    Returns:
      the clamped estimates, in the shape and dtype of `x0`.
    """
    if clamp.ratio is None:
        return jnp.clip(x0, -clamp.limit, clamp.limit)
    inner = tuple(range(1, x0.ndim))
    threshold = jnp.quantile(jnp.abs(x0), clamp.ratio, axis=inner, keepdims=True)
    threshold = jnp.minimum(jnp.maximum(threshold, 1.0), clamp.limit)
    return jnp.clip(x0, -threshold, threshold) / threshold


def min_snr_weight(alpha: Array, sigma: Array, prediction_type: str, gamma: float) -> Array:
    """Returns the min-SNR weight of an output's squared error.

    With it, the squared error of x_0 has the weight min(alpha^2 / sigma^2, gamma): Hang et al.,
    2023, arXiv:2303.09556, section 3.4.
    """
    snr = (alpha / sigma) ** 2
    if prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / snr)
    if prediction_type == "sample":
        return jnp.minimum(snr, gamma)
    return jnp.minimum(snr, gamma) * sigma**2
