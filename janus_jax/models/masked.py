"""Takes the values at the positions of a mask, and puts them back.

Both functions are gathers, and so are their gradients. JAX would compute the gradient of a gather
as a scatter, for which XLA sorts the indices on TPU; each sort takes seconds to compile.

B rows, T positions of a row, N positions to take.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_masked(x: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """Returns the values where the mask is True, in order, followed by zeros.

    x: [B, T, ...]. mask: bool[B, T]. size: N, at least the largest number of True values in a row.
    Returns [B, N, ...] in the dtype of x.
    """
    counts = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    numbers = jnp.arange(size, dtype=jnp.int32)[None]
    # Value n, from 0, is at the first position whose count is more than n. Its index is thus the
    # number of positions whose count is at most n. That takes B * N * T comparisons, but no gathers
    # that depend on each other, as a binary search would.
    before = (counts[:, None] <= numbers[..., None]).astype(jnp.int32)
    index = jnp.minimum(jnp.sum(before, axis=-1), mask.shape[1] - 1)
    return _keep(_take(x, index), numbers < counts[:, -1:])


def put_masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns an array that has the values, in order, where the mask is True, and 0 elsewhere.

    values: [B, N, ...]. mask: bool[B, T], with at most N True values in a row.
    Returns [B, T, ...] in the dtype of values.
    """
    return _put(values, mask, values.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _put(values: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """put_masked, with N as an argument that the gradient can use."""
    index = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    return _keep(_take(values, jnp.clip(index, 0, size - 1)), mask)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """[B, S, ...] and int32[B, R] -> [B, R, ...]."""
    return jnp.take_along_axis(x, _add_axes(index, x), axis=1)


def _keep(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns x where the mask is True and 0 elsewhere. x: [B, R, ...]; mask: bool[B, R]."""
    return jnp.where(_add_axes(mask, x), x, jnp.zeros((), x.dtype))


def _add_axes(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes [B, R] to [B, R, 1, ...], with as many axes as x."""
    return rows.reshape(*rows.shape, *(1,) * (x.ndim - 2))


# Each is the transpose of the other, if the mask has at most N True values in a row.
take_masked.defvjp(
    lambda x, mask, size: (take_masked(x, mask, size), mask),
    lambda size, mask, gradient: (put_masked(gradient, mask), None),
)
_put.defvjp(
    lambda values, mask, size: (_put(values, mask, size), mask),
    lambda size, mask, gradient: (take_masked(gradient, mask, size), None),
)
