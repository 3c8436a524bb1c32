"""Prompt lengths, batch sizes, and the chunks in which many requests are processed."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.models.llama import LlamaConfig

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
    shards = sharding.num_tensor_shards(mesh)
    per_device = CACHE_BYTES * shards // (slots * width * cfg.num_hidden_layers)
    return max(1, per_device) * sharding.num_batch_shards(mesh)


def chunk_size(total: int, max_size: int, shards: int) -> int:
    """Returns the size of the equal chunks into which `total` requests are split.

    The size is a multiple of `shards`, and at most `max_size` unless that is less than `shards`.
    The number of chunks is as small as possible, and the last one may be padded.
    """
    max_size = max(shards, max_size // shards * shards)
    chunks = math.ceil(total / max_size)
    return math.ceil(total / chunks / shards) * shards


def equal_chunks(
    total: int, slots: int, max_batch: int | None, cfg: LlamaConfig, mesh: Mesh | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Splits `total` requests into chunks that fit the memory, and yields as padded_chunks does.

    slots: as for default_max_batch, which is used if max_batch is None.
    max_batch: maximum size of a chunk, unless the mesh has more batch shards.
    """
    max_size = max_batch or default_max_batch(cfg, slots, mesh)
    return padded_chunks(total, chunk_size(total, max_size, sharding.num_batch_shards(mesh)))


def padded_chunks(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Splits the requests 0 to total - 1 into chunks of equal size.

    Yields the numbers of the requests of each chunk, int[size], and how many of them to keep: the
    last chunk is padded with copies of the last request, whose results are dropped.
    """
    for start in range(0, total, size):
        numbers = np.arange(start, start + size)
        yield np.minimum(numbers, total - 1), min(size, total - start)
