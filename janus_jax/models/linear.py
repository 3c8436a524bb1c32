"""The linear layers and look-ups of every network here."""

import jax
import jax.numpy as jnp
from flax import nnx


def linear(
    inputs: int, outputs: int, *, dtype, param_dtype, rngs: nnx.Rngs, use_bias: bool = True
) -> nnx.Linear:
    """A layer float[..., inputs] -> float[..., outputs].

    dtype: to compute in; param_dtype: to store in.
    """
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=dot_of_rows,
        rngs=rngs,
    )


def dot_of_rows(x: jax.Array, kernel: jax.Array, dims=None, **options) -> jax.Array:
    """x @ kernel: float[..., D] and float[D, F] -> float[..., F], leading axes of x made one.

    dims: as nnx.Linear states these axes, always the same. options: of jax.lax.dot_general.
    The kernel's gradient is a sum over the leading axes. Where they are two, XLA on CPU first
    copies the output's gradient transposed, which took longer than the product itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def looked_up(table: nnx.Embed, indices: jax.Array) -> jax.Array:
    """Rows of a table, int32[...] -> float[..., D], in its compute type.

    Cast after they are looked up, unlike nnx.Embed does: so the gradients of a row are added up in
    the type that the table is stored in.
    """
    return jnp.take(table.embedding[...], indices, axis=0).astype(table.dtype)
