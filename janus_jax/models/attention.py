"""Attention and the masks that go with it.

B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
True in a mask means "may attend".
"""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax attention with scale H**-0.5; logits and softmax in float32.

    q: float[B, T, N, H]; k, v: float[B, S, K, H] with N a multiple of K; mask: bool[B, T, S].
    Returns float[B, T, N, H] in q's dtype.
    """
    # JAX itself mixes bfloat16 and float32 here, which strict promotion would refuse.
    with jax.named_scope("attention"), jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None], implementation="xla"
        )


def causal_mask(token_mask: jax.Array, size: int | None = None) -> jax.Array:
    """Mask of a left-padded batch: earlier and own positions, but no padding.

    token_mask: bool[B, T]. size: S >= T, the cache size (later slots are closed); default T.
    Returns bool[B, T, S]. For token_mask = [0 1 1] and size = 4 the rows are
        1 0 0 0      a padding position sees itself, so that its softmax is finite
        0 1 0 0
        0 1 1 0
    """
    length = token_mask.shape[1]
    size = length if size is None else size
    keys = jnp.pad(token_mask, ((0, 0), (0, size - length)))
    query, key = jnp.arange(length)[:, None], jnp.arange(size)[None]
    return (keys[:, None] & (key <= query)[None]) | (key == query)[None]


def segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Mask of packed rows: earlier and own positions of the same example.

    segment_ids: int32[B, T], 0 = padding. Returns bool[B, T, T]. For [1 1 2 0] the rows are
        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 1      padding sees itself only
    """
    position = jnp.arange(segment_ids.shape[1])
    query, key = position[None, :, None], position[None, None]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = (segment_ids > 0)[:, None]
    return (same & real & (key <= query)) | (key == query)


def decode_mask(token_mask: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Mask of one decode step: the prompt's real tokens and everything written since.

    token_mask: bool[B, P], the left-padded prompt's. length: int32 scalar, slots written before
    this step (>= P). size: S. Returns bool[B, 1, S]. For [0 1 1], length 4, size 6 the row is
        0 1 1 1 1 0      slot 3 was written by the first step, slot 4 by this one
    """
    prompt = token_mask.shape[1]
    real = jnp.pad(token_mask, ((0, 0), (0, size - prompt)), constant_values=True)
    slots = jnp.arange(size, dtype=jnp.int32)[None]
    return (real & (slots <= length))[:, None]


def positions_from_mask(token_mask: jax.Array) -> jax.Array:
    """RoPE positions of a left-padded batch: 0 at the first real token.

    token_mask: bool[B, T]. Returns int32[B, T]; padding gets 0.
    """
    return jnp.maximum(jnp.cumsum(token_mask, axis=1) - 1, 0).astype(jnp.int32)
