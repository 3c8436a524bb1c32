"""Autoregressive decoding, shared by image and text generation.

B rows, P prompt length (a bucket length), S cache size, D model width.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.models.janus import Janus
from janus_jax.models.kv_cache import KVCache
from janus_jax.models.llama import Llama, LlamaConfig

_SMALL_BUCKETS = (32, 64, 128)

# Maximum size in bytes of the key/value cache of one batch on each device, if max_batch is not
# given. Parameters and activations need additional memory.
CACHE_BYTES = 4 * 2**30


def bucket_length(length: int) -> int:
    """Returns the length to which a prompt is padded: 32, 64 or a multiple of 128.

    There are only a few such lengths, so a new prompt rarely requires a compilation.
    """
    return next((b for b in _SMALL_BUCKETS if length <= b), math.ceil(length / 128) * 128)


def default_max_batch(cfg: LlamaConfig, slots: int, mesh: Mesh | None) -> int:
    """Returns the number of requests whose key/value cache fits in CACHE_BYTES on each device.

    The number is at least one for each batch shard of the mesh.

    slots: number of cached positions of one request, over all of its rows.
    """
    width = 2 * cfg.num_key_value_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    per_device = CACHE_BYTES * tensor // (slots * width * cfg.num_hidden_layers)
    return max(1, per_device) * sharding.num_batch_shards(mesh)


def chunk_size(total: int, max_size: int, shards: int) -> int:
    """Returns the size of the equal chunks into which `total` requests are split.

    The size is a multiple of `shards`, and at most `max_size` unless that is less than `shards`.
    The number of chunks is as small as possible, and the last one may be padded.
    """
    max_size = max(shards, max_size // shards * shards)
    chunks = math.ceil(total / max_size)
    return math.ceil(total / chunks / shards) * shards


def full_float32_matmuls(function: Callable) -> Callable:
    """Decorator: runs `function(model, ...)` with full-precision matmuls if the model is float32.

    By default, TPUs round the factors of a float32 product to bfloat16 and GPUs to a 10-bit
    mantissa. An image would then depend on the batch that it is generated in.
    """

    @functools.wraps(function)
    def wrapper(model: Janus, *args, **kwargs):
        is_float32 = model.cfg.language_model.dtype == jnp.float32
        with jax.default_matmul_precision("highest") if is_float32 else contextlib.nullcontext():
            return function(model, *args, **kwargs)

    return wrapper


def prefill(
    decoder: Llama, embeds: jax.Array, token_mask: jax.Array, num_new: int, mesh: Mesh | None
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder over left-padded prompts.

    In the cache the padding is on the right, so that a decode step attends to the first slots of a
    row, as kernels for decoding require.

    embeds: float[B, P, D].
    token_mask: bool[B, P].
    num_new: the number of decode steps that the cache has room for.
    Returns the hidden states of the last position, float[B, D], and the cache.
    """
    length = token_mask.shape[1]
    lengths = jnp.sum(token_mask, axis=1, dtype=jnp.int32)
    shifted = (jnp.arange(length, dtype=jnp.int32)[None] - lengths[:, None]) % length
    hidden, cache = decoder(jnp.take_along_axis(embeds, shifted[..., None], axis=1))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, sharding.constrain_cache(cache.resized(length + num_new, lengths), mesh)


def decode_step(decoder: Llama, cache: KVCache, embeds: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs the decoder over one more position.

    embeds: float[B, D].
    Returns the hidden states, float[B, D], and the new cache.
    """
    hidden, cache = decoder(embeds[:, None], cache=cache)
    return hidden[:, 0], cache
