"""The linear layers and look-ups of every network here."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

LINEAR_OUTPUT = "linear_output"  # what remat.py may keep


class Linear(nnx.Linear):
    """A layer float[..., D] -> float[..., F] whose output is rounded to the compute type once.

    A product rounded before the bias is added, as nnx.Linear has it, loses digits in bfloat16 that
    torch keeps. The bias is added in float32 to a float32 product.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        out = self.dot_general(x, kernel, float32_output=self.bias is not None)
        if self.bias is not None:
            out = add_bias(out, self.bias[...]).astype(self.dtype)
        return checkpoint_name(out, LINEAR_OUTPUT)


def linear(
    inputs: int, outputs: int, *, dtype, param_dtype, rngs: nnx.Rngs, use_bias: bool = True
) -> Linear:
    """A layer float[..., inputs] -> float[..., outputs].

    dtype: to compute in; param_dtype: to store in.
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
    """out + bias: float32[..., F] and float[F] -> float32[..., F].

    The bias is broadcast explicitly, for programs that set JAX_NUMPY_RANK_PROMOTION=raise.
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
    """multiply(x, kernel), a product or a convolution, as float32, with its gradients as they are.

    JAX's own gradients would multiply float32 with bfloat16, which GPUs have no kernel for. Nothing
    but a bias and the rounding to the compute type may follow: the gradient that comes then is of
    the compute type anyway.
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
    """The exact (erf) GELU, computed in float32 and rounded once, as in torch.

    Training keeps its input and nothing else.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def flat_matmul(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """x @ kernel: float[..., D] and float[D, F] -> float[..., F], leading axes of x made one.

    options: of jax.lax.dot_general.
    The kernel's gradient is a sum over the leading axes. Where they are two, XLA on CPU first
    copies the output's gradient transposed, which took longer than the product itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def embed_lookup(table: nnx.Embed, indices: jax.Array) -> jax.Array:
    """Rows of a table, int32[...] -> float[..., D], in its compute type.

    Cast after they are looked up, unlike nnx.Embed does: so the gradients of a row are added up in
    the type that the table is stored in.
    """
    return jnp.take(table.embedding[...], indices, axis=0).astype(table.dtype)
