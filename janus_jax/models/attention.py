"""Softmax attention of the decoder and of the image encoder.

B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from janus_jax.models.attention_cuda import cudnn_attention, cudnn_supports
from janus_jax.models.attention_tpu import splash_attention
from janus_jax.models.shards import on_shards

_MIN_KERNEL_LENGTH = 128  # the logits of shorter rows are small


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    q_start: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax attention with scale H**-0.5; logits and softmax are float32.

    The arguments describe which keys a query attends to, in the form that attention kernels accept.
    There is no mask argument:

    | use | arguments | a query attends to | kernels take it as |
    | --- | --- | --- | --- |
    | image encoder | none | all keys | no mask |
    | training rows | causal, segment_ids | its segment, up to itself | causal and segment ids |
    | prefill | causal | the keys up to itself | causal |
    | decode | causal, q_start | the first q_start + 1 keys (T = 1) | key lengths q_start + 1 |

    Prompts are padded on the right, so causality alone hides the padding from every token.

    The platform that the program is compiled for decides how attention is computed. This need not
    be the platform of the devices that are present:

    | platform | bfloat16, T = S >= 128 and no q_start | everything else |
    | --- | --- | --- |
    | TPU | splash attention; pads T to a multiple of 128 | plain XLA |
    | CUDA | cuDNN; if T is even, and H a multiple of 8 up to 128 | plain XLA |
    | others | plain XLA | plain XLA |

    The kernels store no logits, which plain XLA stores as float32[B, N, T, S]. They round to
    bfloat16 at other places than plain XLA; splash attention also rounds the scaled queries.
    docs/development.md says why these kernels were chosen.

    Args:
        q: float[B, T, N, H].
        k, v: float[B, S, K, H], where N is a multiple of K.
        causal: whether query t of row b, which has the position q_start[b] + t, attends only to
            keys 0 to q_start[b] + t.
        q_start: int32[B]; only if causal. None is 0 for every row, with T = S.
        segment_ids: int32[B, T]; only with T = S. A query attends only to keys with its segment id.
    Returns:
        float[B, T, N, H] in the dtype of q.
    """
    length = q.shape[1]
    same_tokens = q_start is None and k.shape[1] == length
    use_kernels = q.dtype == jnp.bfloat16 and same_tokens and length >= _MIN_KERNEL_LENGTH
    kernels = _kernels(q, causal) if use_kernels else {}
    plain = functools.partial(xla_attention, causal=causal, q_start=q_start)
    # JAX's implementations mix bfloat16 and float32, which strict promotion would reject.
    with jax.named_scope("attention"), jax.numpy_dtype_promotion("standard"):
        if not kernels:
            return plain(q, k, v, segment_ids)
        return jax.lax.platform_dependent(q, k, v, segment_ids, default=plain, **kernels)


def _kernels(q: jax.Array, causal: bool) -> dict[str, Callable[..., jax.Array]]:
    """Returns the function (q, k, v, segment_ids) -> output of each platform that has a kernel."""
    kernels = dict(tpu=splash_attention)
    if cudnn_supports(q):
        kernels["cuda"] = cudnn_attention
    return {
        platform: functools.partial(on_shards, functools.partial(kernel, causal=causal))
        for platform, kernel in kernels.items()
    }


def xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    q_start: jax.Array | None = None,
) -> jax.Array:
    """Computes `attention` without a kernel; the arguments are those of `attention`."""
    mask = attention_mask(q.shape[1], k.shape[1], causal, q_start, segment_ids)
    return jax.nn.dot_product_attention(
        q, k, v, mask=None if mask is None else mask[:, None], implementation="xla"
    )


def attention_mask(
    length: int,
    size: int,
    causal: bool,
    q_start: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array | None:
    """Returns the mask of `attention` for implementations that need one; True: may attend.

    length, size: T and S. For the other arguments see `attention`.
    Returns bool[B, T, S], or [1, T, S] if all rows have the same mask, or None without a mask.

    With segment_ids = [1 1 2 0] and causal, the rows are 1 0 0 0, 1 1 0 0, 0 0 1 0 and 0 0 0 1.
    With T = 1, S = 4 and q_start = [2 0], they are 1 1 1 0 for the first and 1 0 0 0 for the second
    row of the batch.
    """
    mask = None
    if causal:
        start = jnp.zeros(1, jnp.int32) if q_start is None else q_start
        query = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        mask = jnp.arange(size, dtype=jnp.int32)[None, None] <= query[..., None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same if mask is None else mask & same
    return mask
