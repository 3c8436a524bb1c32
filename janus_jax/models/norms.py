"""Flax's norms, made to work under JAX_NUMPY_DTYPE_PROMOTION=strict.

Given bfloat16 inputs, Flax multiplies them by float32 statistics, which strict promotion rejects.
"""

import jax
from flax import nnx


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm that computes under standard dtype promotion."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., D]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class RMSNorm(nnx.RMSNorm):
    """nnx.RMSNorm that computes under standard dtype promotion."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., D]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)
