"""What the network predicts, and how x_0 is got back from it: the one place that knows.

The prediction types are "epsilon" (Ho et al., 2020, arXiv:2006.11239), "v_prediction" (Salimans and
Ho, 2022, arXiv:2202.00512, appendix D), "sample", which is x_0 itself, and "flow" (Lipman et al.,
2023, arXiv:2210.02747), the velocity eps - x_0 where alpha = 1 - sigma.
"""

import jax.numpy as jnp
from jax import Array


def noisy(x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """The forward process, x_t = alpha x_0 + sigma eps (Ho et al., 2020, equation 4)."""
    return alpha * x0 + sigma * noise


def target(x0: Array, noise: Array, alpha: Array, sigma: Array, prediction_type: str) -> Array:
    """What the network is trained to predict from `noisy(...)`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow":
        return noise - x0
    return alpha * noise - sigma * x0


def to_x0(output: Array, x: Array, alpha: Array, sigma: Array, prediction_type: str) -> Array:
    """The estimate of x_0 that the network's output means, given its input `x`."""
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "flow":
        return x - sigma * output
    return alpha * x - sigma * output


def min_snr_weight(alpha: Array, sigma: Array, prediction_type: str, gamma: float) -> Array:
    """What an output's squared error counts.

    Such that that of x_0 counts min(alpha^2 / sigma^2, gamma): Hang et al., 2023, arXiv:2303.09556,
    section 3.4.
    """
    snr = (alpha / sigma) ** 2
    if prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / snr)
    if prediction_type == "sample":
        return jnp.minimum(snr, gamma)
    return jnp.minimum(snr, gamma) * sigma**2
