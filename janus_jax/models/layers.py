"""Layers that all networks share: linear layers, norms, GELU, embeddings, and stacks of blocks."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

_SAVED = "saved"  # the name of the values that saved() marks
# Which values are saved for the backward pass, by the value of `remat`; see block_call.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(_SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT_CHOICES = ("none", *REMAT_POLICIES)

# A matrix product float[..., D], float[D, F] -> float[..., F] whose factors have one dtype.
Product = Callable[[jax.Array, jax.Array], jax.Array]


class Linear(nnx.Linear):
    """A linear layer that rounds its output to the compute dtype only once.

    nnx.Linear rounds the product before it adds the bias, which in bfloat16 loses digits that
    PyTorch keeps. This layer adds the bias to a float32 product, in float32.

    Every use of the kernel passes through `dot_general(x, kernel, product)`, which returns
    product(x, kernel) unless an adapter or a quantized kernel replaces it. The layer chooses
    `product`, one of the products in this module, and with it the dtype of the output.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., F] in the compute dtype."""
        if self.bias is None:
            return self._multiply(x, flat_matmul)
        return add_bias(self._multiply(x, float32_matmul), self.bias[...]).astype(self.dtype)

    def _multiply(self, x: jax.Array, product: Product) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        return self.dot_general(x.astype(self.dtype), kernel, product)


class Head(Linear):
    """A linear layer whose outputs are logits: float32, and not rounded to the compute dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float32[..., F]."""
        out = self._multiply(x, float32_matmul)
        return out if self.bias is None else add_bias(out, self.bias[...])


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype,
    param_dtype,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    layer: type[Linear] = Linear,
) -> Linear:
    """Returns a layer that maps float[..., inputs] to float[..., outputs].

    dtype: the compute dtype.
    param_dtype: the dtype of the stored parameters.
    layer: Linear, or Head for a layer that returns logits.
    """
    return layer(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=multiply,
        rngs=rngs,
    )


def multiply(x: jax.Array, kernel: jax.Array, product: Product) -> jax.Array:
    """Returns product(x, kernel): the `dot_general` of a layer without an adapter."""
    return product(x, kernel)


def add_bias(out: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns out + bias: float32[..., F] and float[F] -> float32[..., F].

    The bias is broadcast explicitly because users may set JAX_NUMPY_RANK_PROMOTION=raise.
    """
    return out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_float32_output(product: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns product(x, kernel) in float32, with gradients computed in the input dtype.

    product: a matrix product or a convolution that accepts `preferred_element_type`.

    JAX's own gradients would multiply float32 by bfloat16, for which GPUs have no kernel: XLA would
    convert the kernel to float32. The incoming gradient is cast to the input dtype instead. This
    loses nothing if only a bias and a cast to that dtype follow. The gradient of logits is rounded,
    as in PyTorch; TPUs round the factors of every product by default.
    """
    return product(x, kernel, preferred_element_type=jnp.float32)


def _float32_output_forward(product: Callable, x: jax.Array, kernel: jax.Array):
    return with_float32_output(product, x, kernel), (x, kernel)


def _float32_output_backward(product: Callable, factors, gradient: jax.Array):
    _, pull_back = jax.vjp(product, *factors)
    return pull_back(gradient.astype(factors[0].dtype))


with_float32_output.defvjp(_float32_output_forward, _float32_output_backward)


@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact (erf) GELU of x, computed in float32 and rounded once as in PyTorch.

    For the backward pass only the input is saved.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def flat_matmul(
    x: jax.Array, kernel: jax.Array, preferred_element_type: DTypeLike | None = None
) -> jax.Array:
    """Returns x @ kernel with the leading axes of x flattened into one.

    x: float[..., D]; kernel: float[D, F]. Returns float[..., F] in the dtype of x or the given one.

    The gradient of the kernel is a sum over the leading axes. With two of them, XLA on CPU first
    makes a transposed copy of the output's gradient, which took longer than the product itself.

    In bfloat16, a single row is multiplied twice. For some GPUs, XLA would otherwise write the
    products of all elements, float[D, F], before it adds them up.
    """
    rows = x.reshape(-1, x.shape[-1])
    if is_single := len(rows) == 1 and x.dtype == jnp.bfloat16:
        rows = jnp.broadcast_to(rows, (2, x.shape[-1]))
    out = jax.lax.dot_general(
        rows, kernel, (((1,), (0,)), ((), ())), preferred_element_type=preferred_element_type
    )
    out = out[:1] if is_single else out
    return out.reshape(*x.shape[:-1], out.shape[-1])


def float32_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel in float32, with gradients computed in the input dtype."""
    return with_float32_output(flat_matmul, x, kernel)


def embed_lookup(table: nnx.Embed, indices: jax.Array) -> jax.Array:
    """Looks up embeddings: int32[...] -> float[..., D] in the table's compute dtype.

    Unlike nnx.Embed, this casts after the lookup, so that the gradients of a row are summed in the
    dtype in which the table is stored.
    """
    return jnp.take(table.embedding[...], indices, axis=0).astype(table.dtype)


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm that works under JAX_NUMPY_DTYPE_PROMOTION=strict.

    Flax multiplies bfloat16 inputs by float32 statistics, which strict promotion rejects.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., D]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class RMSNorm(nnx.RMSNorm):
    """nnx.RMSNorm that works under JAX_NUMPY_DTYPE_PROMOTION=strict, see LayerNorm."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., D]."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


def saved(x: jax.Array) -> jax.Array:
    """Returns x, marked as a value of a block that is saved if `remat` is "dots"."""
    return checkpoint_name(x, _SAVED)


def block_call(block: type[nnx.Module], remat: str) -> Callable:
    """Returns the __call__ of a block class, wrapped according to `remat`.

    remat: which values are saved for the backward pass; all others are recomputed.
        "none": everything.
        "dots": the inputs of the block and what it marks with `saved`: the outputs of its linear
            layers except the last one of attention and of the MLP. Attention, its last linear
            layer and elementwise operations are recomputed.
        "full": only the inputs of the block.
    """
    if remat == "none":
        return block.__call__
    return nnx.remat(block.__call__, policy=REMAT_POLICIES[remat])


def run_layers(
    call: Callable[..., tuple[jax.Array, Any]],
    layers: Sequence[nnx.Module],
    x: jax.Array,
    *,
    inputs: Sequence | None = None,
    scan: bool = False,
) -> tuple[jax.Array, list]:
    """Applies layers one after the other: x, output = call(layer, x, input).

    inputs: one per layer; None if `call` takes none.
    scan: whether to apply the layers in one loop, `jax.lax.scan`, over their stacked parameters.
        They must have the same parameters, and `call` must return the same shapes for each.
    Returns the last x, and the output of each layer.

    Raises:
        ValueError: inputs and scan.

    XLA compiles the body of a loop once, instead of every layer. The stacked parameters are a copy,
    unless they were cut out of a stack before (training/stacked.py). A decode step must not make
    this copy.
    """
    if not scan:
        outputs = []
        for i, layer in enumerate(layers):
            x, output = call(layer, x) if inputs is None else call(layer, x, inputs[i])
            outputs.append(output)
        return x, outputs
    if inputs is not None:
        raise ValueError("a loop over layers takes no inputs; expected inputs=None or scan=False")
    graphs, states = zip(*map(nnx.split, layers), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    x, outputs = jax.lax.scan(
        lambda x, state: call(nnx.merge(graphs[0], state), x), x, stacked
    )
    return x, [jax.tree.map(operator.itemgetter(i), outputs) for i in range(len(layers))]
