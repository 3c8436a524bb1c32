"""Linear layers, GELU and embedding lookup, shared by all networks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

LINEAR_OUTPUT = "linear_output"  # the name by which remat.py saves the outputs


class Linear(nnx.Linear):
    """A linear layer that rounds its output to the compute dtype only once.

    nnx.Linear rounds the product before it adds the bias, which in bfloat16 loses digits that
    PyTorch keeps. This layer adds the bias to a float32 product, in float32.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., F]."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        out = self.dot_general(x, kernel, float32_output=self.bias is not None)
        if self.bias is not None:
            out = add_bias(out, self.bias[...]).astype(self.dtype)
        return checkpoint_name(out, LINEAR_OUTPUT)


def linear(
    inputs: int, outputs: int, *, dtype, param_dtype, rngs: nnx.Rngs, use_bias: bool = True
) -> Linear:
    """Returns a layer that maps float[..., inputs] to float[..., outputs].

    dtype: the compute dtype.
    param_dtype: the dtype of the stored parameters.
    """
    return Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=matmul,
        rngs=rngs,
    )


def add_bias(out: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns out + bias: float32[..., F] and float[F] -> float32[..., F].

    The bias is broadcast explicitly because users may set JAX_NUMPY_RANK_PROMOTION=raise.
    """
    return out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)


def matmul(x: jax.Array, kernel: jax.Array, float32_output: bool) -> jax.Array:
    """Returns x @ kernel: float[..., D] and float[D, F] of one dtype -> float[..., F].

    The output has the dtype of the inputs, or float32 if float32_output is set.
    """
    if float32_output:
        return with_float32_output(flat_matmul, x, kernel)
    return flat_matmul(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_float32_output(multiply: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns multiply(x, kernel) in float32, with gradients computed in the input dtype.

    multiply: a matrix product or a convolution that accepts `preferred_element_type`.

    JAX's own gradients would multiply float32 by bfloat16, for which GPUs have no kernel. The
    incoming gradient is cast to the input dtype instead. This loses nothing as long as only a bias
    and a cast to that dtype follow, because then the gradient already has its precision.
    """
    return multiply(x, kernel, preferred_element_type=jnp.float32)


def _float32_output_forward(multiply: Callable, x: jax.Array, kernel: jax.Array):
    return with_float32_output(multiply, x, kernel), (x, kernel)


def _float32_output_backward(multiply: Callable, factors, gradient: jax.Array):
    _, pull_back = jax.vjp(multiply, *factors)
    return pull_back(gradient.astype(factors[0].dtype))


with_float32_output.defvjp(_float32_output_forward, _float32_output_backward)


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact (erf) GELU of x, computed in float32 and rounded once as in PyTorch.

    For the backward pass only the input is saved.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def flat_matmul(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """Returns x @ kernel with the leading axes of x flattened into one.

    x: float[..., D]; kernel: float[D, F]; options: keyword arguments of jax.lax.dot_general.
    Returns float[..., F].

    The gradient of the kernel is a sum over the leading axes. With two of them, XLA on CPU first
    makes a transposed copy of the output's gradient, which took longer than the product itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def embed_lookup(table: nnx.Embed, indices: jax.Array) -> jax.Array:
    """Looks up embeddings: int32[...] -> float[..., D] in the table's compute dtype.

    Unlike nnx.Embed, this casts after the lookup, so that the gradients of a row are summed in the
    dtype in which the table is stored.
    """
    return jnp.take(table.embedding[...], indices, axis=0).astype(table.dtype)
