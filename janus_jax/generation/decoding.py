"""The decoder, one position at a time: what drawing images and writing text have in common.

B rows, P prompt length (a bucket), S cache size, D model width.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.models.attention import causal_mask, decode_mask, positions_from_mask
from janus_jax.models.janus import Janus
from janus_jax.models.kv_cache import KVCache
from janus_jax.models.llama import Llama, LlamaConfig, init_cache

_SMALL_BUCKETS = (32, 64, 128)

# What the keys and values of one batch may take on a device, when max_batch is not given. With it
# go the parameters and the activations.
CACHE_BYTES = 4 * 2**30


def bucket_length(length: int) -> int:
    """The length a prompt is padded to: 32, 64 or a multiple of 128.

    Few lengths, so that a new prompt seldom needs a new program.
    """
    return next((b for b in _SMALL_BUCKETS if length <= b), math.ceil(length / 128) * 128)


def batch_within_memory(cfg: LlamaConfig, slots: int, mesh: Mesh | None) -> int:
    """How many entries of `slots` cached positions each have CACHE_BYTES a device; at least one."""
    width = 2 * cfg.num_key_value_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    per_device = CACHE_BYTES * tensor // (slots * width * cfg.num_hidden_layers)
    return max(1, per_device) * sharding.num_batch_shards(mesh)


def chunk_size(total: int, most: int, shards: int) -> int:
    """Size of equal chunks of at most `most` entries, a multiple of the shards (so at least that).
    """
    most = max(shards, most // shards * shards)
    chunks = math.ceil(total / most)
    return math.ceil(total / chunks / shards) * shards


def in_full_float32(function: Callable) -> Callable:
    """Lets a function of a Janus multiply float32 as float32, where float32 is its compute type.

    By default TPUs round the factors to bfloat16 and GPUs to 10 bits, and then an image is not
    the same in another batch.
    """

    @functools.wraps(function)
    def exact(model: Janus, *args, **kwargs):
        full = model.cfg.language_model.dtype == jnp.float32
        with jax.default_matmul_precision("highest") if full else contextlib.nullcontext():
            return function(model, *args, **kwargs)

    return exact


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What the decoder has read so far.

    cache: keys and values; its length counts the prompt's padding too.
    token_mask: bool[B, P], True where a token of the left-padded prompt may be attended to.
    """

    cache: KVCache
    token_mask: jax.Array


def prefill(
    decoder: Llama, embeds: jax.Array, token_mask: jax.Array, num_new: int, mesh: Mesh | None
) -> tuple[jax.Array, Context]:
    """Reads left-padded prompts: float[B, P, D], bool[B, P] -> hidden, float[B, D], at their ends.

    The cache has room for exactly num_new positions more.
    """
    batch, length = token_mask.shape
    size = length + num_new
    cache = sharding.constrain_cache(init_cache(decoder.cfg, batch, size), mesh)
    attn_mask = causal_mask(token_mask, size)
    hidden, cache = decoder(embeds, positions_from_mask(token_mask), attn_mask, cache)
    return hidden[:, -1], Context(cache, token_mask)


def decode_step(
    decoder: Llama, context: Context, embeds: jax.Array
) -> tuple[jax.Array, Context]:
    """Reads one position more: float[B, D] -> hidden, float[B, D]."""
    cache, token_mask = context.cache, context.token_mask
    attn_mask = decode_mask(token_mask, cache.length, cache.size)
    # positions count a row's real tokens, so padding on the left changes none of them
    written = cache.length - token_mask.shape[1]
    positions = jnp.sum(token_mask, axis=1, keepdims=True, dtype=jnp.int32) + written
    hidden, cache = decoder(embeds[:, None], positions.astype(jnp.int32), attn_mask, cache)
    return hidden[:, 0], Context(cache, token_mask)
