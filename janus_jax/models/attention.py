"""Attention, attention masks and positions.

B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
In every attention mask, True means "may attend".
"""

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Computes softmax attention with scale H**-0.5; logits and softmax are float32.

    q: float[B, T, N, H].
    k, v: float[B, S, K, H], where N is a multiple of K.
    mask: bool[B, T, S]; None lets every query attend to every key.
    Returns float[B, T, N, H] in the dtype of q.
    """
    # JAX's implementation mixes bfloat16 and float32, which strict promotion would reject.
    with jax.named_scope("attention"), jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None], implementation="xla"
        )


def causal_mask(token_mask: jax.Array, size: int | None = None) -> jax.Array:
    """Returns the causal mask of a left-padded batch.

    A position attends to itself and to earlier positions, but not to padding.

    token_mask: bool[B, T].
    size: S >= T, the cache size; slots from T on are masked. Default: T.
    Returns bool[B, T, S]. For token_mask = [0 1 1] and size = 4 the rows are
        1 0 0 0      a padding position attends to itself, which keeps its softmax finite
        0 1 0 0
        0 1 1 0
    """
    length = token_mask.shape[1]
    size = length if size is None else size
    keys = jnp.pad(token_mask, ((0, 0), (0, size - length)))
    query, key = jnp.arange(length)[:, None], jnp.arange(size)[None]
    return (keys[:, None] & (key <= query)[None]) | (key == query)[None]


def segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Returns the causal mask of packed rows.

    A position attends to itself and to earlier positions of the same example.

    segment_ids: int32[B, T], 0 = padding.
    Returns bool[B, T, T]. For segment_ids = [1 1 2 0] the rows are
        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 1      padding attends to itself only
    """
    position = jnp.arange(segment_ids.shape[1])
    query, key = position[None, :, None], position[None, None]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = (segment_ids > 0)[:, None]
    return (same & real & (key <= query)) | (key == query)


def decode_mask(token_mask: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Returns the mask of one decode step: the tokens of the prompt and all tokens since.

    token_mask: bool[B, P], of the left-padded prompt.
    length: int32 scalar, number of cache slots written before this step, at least P.
    size: S, the cache size.
    Returns bool[B, 1, S]. For token_mask = [0 1 1], length = 4 and size = 6 the row is
        0 1 1 1 1 0      the first step wrote slot 3, this one writes slot 4
    """
    prompt = token_mask.shape[1]
    real = jnp.pad(token_mask, ((0, 0), (0, size - prompt)), constant_values=True)
    slots = jnp.arange(size, dtype=jnp.int32)[None]
    return (real & (slots <= length))[:, None]


def positions_from_mask(token_mask: jax.Array) -> jax.Array:
    """Returns the RoPE positions of a left-padded batch; the first real token has position 0.

    token_mask: bool[B, T].
    Returns int32[B, T]; padding gets position 0.
    """
    return jnp.maximum(jnp.cumsum(token_mask, axis=1) - 1, 0).astype(jnp.int32)
