"""Attention on TPUs by splash attention, the Pallas kernel of JAX, which stores no logits.

B batch, T length, N query heads, K key/value heads, H head dim.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

_LANES = 128  # width of a TPU register; lengths and blocks are multiples of it
# Maximum number of queries, and of keys, that the kernels process at a time. 1024 also fit into the
# 16 MB of vector memory that a kernel may use on v5e, but take 1.6 x as long to compile.
_MAX_BLOCK = 512


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Computes self-attention as `attention` in models/attention.py defines it.

    Args:
        q: bfloat16[B, T, N, H].
        k, v: bfloat16[B, T, K, H], where N is a multiple of K.
        segment_ids: int32[B, T] or None; at least 0.
        causal: as for `attention`.
        interpret: whether to run the kernels in Pallas' interpreter, which needs no TPU.
    Returns:
        bfloat16[B, T, N, H].
    """
    length = q.shape[1]
    if extra := -length % _LANES:
        if segment_ids is None and not causal:  # causality alone would hide the keys added here
            segment_ids = jnp.zeros((len(q), length), jnp.int32)
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, extra)), constant_values=-1)
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return _run_kernel(q, k, v, segment_ids, causal, interpret).swapaxes(1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _run_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """Runs the kernel on scaled queries and on arrays whose second axis is the heads.

    Its own gradient ensures that the kernels of the backward pass have the same settings.
    """
    kernel = _make_kernel(q.shape[2], q.shape[1], causal, interpret)

    def row(q, k, v, ids):
        return kernel(q, k, v, ids if ids is None else splash_attention_kernel.SegmentIds(ids, ids))

    with _kernel_settings():
        return jax.vmap(row)(q, k, v, segment_ids)


def _run_kernel_forward(q, k, v, segment_ids, causal, interpret):
    def run(q, k, v):
        return _run_kernel.fun(q, k, v, segment_ids, causal, interpret)

    return jax.vjp(run, q, k, v)


def _run_kernel_backward(causal, interpret, pull_back, gradient):
    with _kernel_settings():
        return *pull_back(gradient), None


_run_kernel.defvjp(_run_kernel_forward, _run_kernel_backward)


@contextlib.contextmanager
def _kernel_settings() -> Iterator[None]:
    """Resets settings of JAX to the defaults, which the kernels need.

    For example, the kernels cannot multiply bfloat16 with the precision "highest".
    """
    with (
        jax.enable_x64(False),
        jax.default_matmul_precision("default"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@functools.lru_cache(maxsize=64)
def _make_kernel(
    length: int, heads: int, causal: bool, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel for a row of `length` positions and `heads` query heads."""
    mask_type = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    mask = splash_attention_mask.MultiHeadMask([mask_type((length, length))] * heads)
    # Two kernels for the backward pass, one for dq and one for dk and dv. JAX also has one kernel
    # for all three, but it needs a partial sum of dq for each block of keys.
    blocks = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    block = _block_size(length)
    sizes = splash_attention_kernel.BlockSizes(**{f"block_{name}": block for name in blocks})
    with jax.ensure_compile_time_eval():  # arrays of a trace must not be kept in the cache
        return splash_attention_kernel.make_splash_mha_single_device(
            mask, block_sizes=sizes, interpret=interpret
        )


def _block_size(length: int) -> int:
    """Returns the largest multiple of _LANES up to _MAX_BLOCK that divides the length."""
    return next(size for size in range(_MAX_BLOCK, 0, -_LANES) if length % size == 0)
