"""Attention on NVIDIA GPUs by the flash attention of cuDNN, which stores no logits.

B batch, T length, N query heads, K key/value heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

_MAX_HEAD_DIM = 128  # of all GPUs from Ampere on


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, causal: bool
) -> jax.Array:
    """Computes self-attention as `attention` in models/attention.py defines it.

    JAX has no public interface to the packed sequences of cuDNN. Segments thus become a mask, which
    JAX passes as a bias: bfloat16[B, 1, T, T], without an axis for the heads.

    Args:
        q: bfloat16[B, T, N, H].
        k, v: bfloat16[B, T, K, H], where N is a multiple of K.
        segment_ids: int32[B, T] or None.
        causal: as for `attention`.
    Returns:
        bfloat16[B, T, N, H].
    """
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation="cudnn"
    )


def cudnn_supports(q: jax.Array) -> bool:
    """Whether cudnn_attention can be compiled here for these queries, float[B, T, N, H]."""
    length, head_dim = q.shape[1], q.shape[3]
    has_kernel = length % 2 == 0 and head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM
    return has_kernel and _has_cudnn()


@functools.cache
def _has_cudnn() -> bool:
    """Whether cuDNN is installed, and no GPU of this machine is older than Ampere.

    A machine without a GPU compiles for another one, which must be an Ampere or later.
    """
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(cudnn_attention, causal=True), x, x, x, None)
    except RuntimeError:  # raised by JAX without its CUDA libraries
        return False
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return True
    return all(float(device.compute_capability) >= 8 for device in devices)
