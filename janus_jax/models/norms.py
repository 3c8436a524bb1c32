"""Flax's norms, also for programs that set JAX_NUMPY_DTYPE_PROMOTION=strict.

In bfloat16 they multiply the input with statistics in float32, which strict promotion refuses.
"""

import jax
from flax import nnx


class LayerNorm(nnx.LayerNorm):
    """float[..., D] -> float[..., D]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class RMSNorm(nnx.RMSNorm):
    """float[..., D] -> float[..., D]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)
