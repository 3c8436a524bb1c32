"""The key/value cache of a decoder: a plain pytree that is passed in and returned.

B batch, S cache size, K key/value heads, H head dim.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions so far, one array per layer.

    With separate arrays, a decode step updates each of them in place.

    keys, values: one float[B, S, K, H] array per layer.
    length: int32 scalar, how many of the S slots are written. It is the same for every row: prompts
        of unequal length are left-padded, and the attention mask hides the padding.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def size(self) -> int:
        """S, the number of slots."""
        return self.keys[0].shape[1]
