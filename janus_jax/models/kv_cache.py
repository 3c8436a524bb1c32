"""Keys and values of the positions so far: a plain pytree, passed in and returned.

B batch, S cache size, K key/value heads, H head dim.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # llama imports this file
    from janus_jax.models.llama import LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One array per layer, so that a decode step updates each in place.

    keys, values: tuple over layers of float[B, S, K, H].
    length: int32 scalar, how many of the S slots are written; the same for every row (rows of
        unequal length are left-padded and told apart by the attention mask).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def size(self) -> int:
        """S, the number of slots."""
        return self.keys[0].shape[1]


def init_cache(cfg: "LlamaConfig", batch: int, size: int) -> KVCache:
    """An empty cache for `batch` rows of at most `size` tokens."""
    shape = (batch, size, cfg.num_key_value_heads, cfg.head_dim)
    empty = [jnp.zeros(shape, cfg.dtype) for _ in range(2 * cfg.num_hidden_layers)]
    half = cfg.num_hidden_layers
    return KVCache(tuple(empty[:half]), tuple(empty[half:]), jnp.zeros((), jnp.int32))
