"""The cross-entropy of a head on long rows, computed for a chunk of positions at a time.

B rows, T positions of a row, C positions of a chunk, N chunks, D model width, V size of the
vocabulary or codebook.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from janus_jax.models.masked import put_masked, take_masked

# (parameters, hidden states float[B, C, D]) -> logits, float32[B, C, V]
Logits = Callable[[list[jax.Array], jax.Array], jax.Array]


def cross_entropies(
    head: nnx.Module,
    hidden: jax.Array,
    targets: jax.Array,
    target_mask: jax.Array,
    chunk: int,
) -> jax.Array:
    """Returns the cross-entropy at the positions of target_mask and 0 elsewhere, float32[B, T].

    The masked positions of each row are moved to the front, and the head is applied to `chunk` of
    them at a time. The full logits float32[B, T, V] never exist, neither in the forward nor in the
    backward pass, and chunks without a target are skipped.

    Only first derivatives can be computed, in reverse mode.

    Args:
        head: float[B, C, D] -> float32[B, C, V]. Its compute dtype must be that of `hidden`, to
            which its matrices are cast.
        hidden: float[B, T, D].
        targets: int32[B, T]. The loss of a target outside of 0 to V - 1 is NaN.
        target_mask: bool[B, T].
        chunk: C.
    """
    length = targets.shape[1]
    chunk = min(chunk, length)
    size = length + -length % chunk
    # take_masked(mask, mask) is True for the targets and False for the padding behind them
    parts = [
        _chunks(take_masked(part, target_mask, size), chunk)
        for part in (hidden, targets, target_mask)
    ]

    graph, state = nnx.split(head)
    params, tree = jax.tree.flatten(state)

    def logits(params: list[jax.Array], hidden: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree.unflatten(tree, params))(hidden)

    losses = _chunk_losses(logits, params, *parts)
    losses = jnp.moveaxis(losses, 0, 1).reshape(len(targets), size)
    return put_masked(losses, target_mask)


def _chunks(part: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [N, B, C, ...]."""
    return jnp.moveaxis(part.reshape(len(part), -1, chunk, *part.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_losses(
    logits: Logits,
    params: list[jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    target_mask: jax.Array,
) -> jax.Array:
    """Returns the cross-entropies of all chunks, float32[N, B, C]; 0 where target_mask is False.

    The gradient is defined below: a loop that adds the gradient of each chunk to one sum, and stops
    at the first chunk without a target. JAX's gradient would also add zeros for the other chunks,
    and hold the gradient of one chunk in addition to the sum.

    params: those of the head. hidden: float[N, B, C, D]. targets: int32[N, B, C].
    target_mask: bool[N, B, C]. The targets of a row must be in its first chunks.
    """
    copies = _cast_matrices(params, hidden.dtype)

    def losses(_, chunk):
        hidden, targets, mask = chunk
        compute = functools.partial(_masked_losses, logits, copies, hidden, targets, mask)
        zeros = functools.partial(jnp.zeros, mask.shape, jnp.float32)
        return None, jax.lax.cond(jnp.any(mask), compute, zeros)

    return jax.lax.scan(losses, None, (hidden, targets, target_mask))[1]


def _masked_losses(logits: Logits, params, hidden, targets, mask) -> jax.Array:
    """Returns the cross-entropies of one chunk, float32[B, C]; 0 where the mask is False."""
    scores = logits(params, hidden)
    # Not by indexing, whose gradient is a scatter into an array of zeros as large as the logits.
    is_target = jnp.arange(scores.shape[-1], dtype=targets.dtype)[None, None] == targets[..., None]
    target_scores = jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)
    target_scores = jnp.where(jnp.any(is_target, axis=-1), target_scores, jnp.nan)
    return jnp.where(mask, jax.nn.logsumexp(scores, axis=-1) - target_scores, 0.0)


def _cast_matrices(params: list[jax.Array], dtype) -> list[jax.Array]:
    """Casts matrices, once for all chunks, to the dtype in which the head multiplies them."""
    return [param.astype(dtype) if param.ndim > 1 else param for param in params]


def _forward(logits: Logits, params, hidden, targets, target_mask):
    """Returns the cross-entropies and what the backward pass needs.

    Each array is given as an object with its `value`, and with `perturbed`: whether its gradient is
    needed. That of `hidden` is always computed, because XLA removes it if it is not used.
    """
    values = [param.value for param in params]
    trained = {i: param.value for i, param in enumerate(params) if param.perturbed}
    parts = hidden.value, targets.value, target_mask.value
    return _chunk_losses(logits, values, *parts), (values, trained, parts)


def _backward(logits: Logits, residuals, gradient: jax.Array):
    """Returns the gradients of the arguments, given that of the losses, float32[N, B, C]."""
    params, trained, (hidden, targets, mask) = residuals
    copies = _cast_matrices(params, hidden.dtype)

    def losses(trained: dict[int, jax.Array], hidden, targets, mask) -> jax.Array:
        params = [trained.get(i, copy) for i, copy in enumerate(copies)]
        return _masked_losses(logits, params, hidden, targets, mask)

    def has_target(carry) -> jax.Array:
        i = carry[0]
        return (i < len(mask)) & jnp.any(mask[i])

    def add_chunk(carry):
        i, sums, hidden_grads = carry
        function = functools.partial(losses, targets=targets[i], mask=mask[i])
        _, pull_back = jax.vjp(function, {key: copies[key] for key in trained}, hidden[i])
        grads, hidden_grad = pull_back(gradient[i])
        sums = {key: total + grads[key].astype(total.dtype) for key, total in sums.items()}
        return i + 1, sums, hidden_grads.at[i].set(hidden_grad)

    zeros = jax.tree.map(jnp.zeros_like, (trained, hidden))
    _, sums, hidden_grads = jax.lax.while_loop(has_target, add_chunk, (jnp.int32(0), *zeros))
    return [sums.get(i) for i in range(len(params))], hidden_grads, None, None


_chunk_losses.defvjp(_forward, _backward, symbolic_zeros=True)
