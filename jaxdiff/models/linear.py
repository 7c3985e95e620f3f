"""The linear layer of all networks."""

from flax import nnx
from jax import Array

from jaxdiff.models import products


class Linear(nnx.Linear):
    """An affine map of the last axis.

    Its kernel may be another object than an array, which then multiplies itself: one that is
    quantised together with its inputs (`weights.quantization.Quantized`).
    """

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, dot_general=products.dot_general, **options)

    def __call__(self, x: Array) -> Array:
        """Maps [..., in] to [..., out]."""
        kernel = self.kernel.get_value()
        if not hasattr(kernel, "product"):
            return super().__call__(x)
        mapped = kernel.product(x)
        return mapped if self.bias is None else mapped + self.bias[...].astype(mapped.dtype)
