"""The key/value cache of a decoder: a plain pytree that is passed in and returned.

B rows, S slots of a row, T new positions, K key/value heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions so far, one array per layer.

    With separate arrays, a decode step updates each of them in place.

    keys, values: one float[B, S, K, H] array per layer. Slot s of a row holds position s.
    lengths: int32[B], how many slots of a row are valid. Rows may have different lengths; new
        positions of a row are written behind its valid slots, over padding if there is any.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def size(self) -> int:
        """S, the number of slots of a row."""
        return self.keys[0].shape[1]

    def resized(self, size: int, lengths: jax.Array) -> "KVCache":
        """Returns a cache with room for `size` slots in each row, of which `lengths` are valid."""

        def pad(slots: jax.Array) -> jax.Array:
            return jnp.pad(slots, ((0, 0), (0, size - self.size), (0, 0), (0, 0)))

        return KVCache(tuple(map(pad, self.keys)), tuple(map(pad, self.values)), lengths)


def write_slots(slots: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new positions into the slots from start[b] on of each row b.

    slots: float[B, S, K, H].
    new: float[B, T, K, H].
    start: int32[B]. Positions that would lie behind the last slot are dropped.
    Returns float[B, S, K, H].
    """

    def write_row(slots: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        index = start + jnp.arange(len(new), dtype=jnp.int32)
        return slots.at[index].set(new, mode="drop", unique_indices=True, indices_are_sorted=True)

    # under vmap this is one scatter, which XLA does in place
    return jax.vmap(write_row)(slots, new, start)
