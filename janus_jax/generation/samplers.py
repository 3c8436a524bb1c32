"""Choosing one index from logits: greedy, or sampled with temperature, top-k and top-p.

B batch, V vocabulary (the codebook, where images are drawn).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.checks import FLOAT32_MAX, check_count, check_number

# The same numbers on every machine, whatever generator a user's settings make the default.
_GENERATOR = "threefry2x32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an index is chosen; the values are traced, so changing one compiles nothing anew.

    temperature: 0 is greedy.
    top_k, top_p: None leaves the filter, and the sorting it needs, out of the program.
    """

    temperature: np.float32
    top_k: np.int32 | None = None
    top_p: np.float32 | None = None


def check_sampling(temperature, top_k, top_p) -> tuple[float, int | None, float | None]:
    """The settings as Python numbers.

    Raises:
        ValueError: temperature < 0, top_k < 1, top_p outside (0, 1], or not a number.
    """
    temperature = check_number("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0 (0 is greedy), got {temperature}")
    if top_k is not None:
        top_k = check_count("top_k", top_k)
    if top_p is not None:
        top_p = check_number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    return temperature, top_k, top_p


def make_sampling(temperature, top_k, top_p, size: int) -> Sampling:
    """Checked settings for choosing among `size` indices.

    top_p = 1 is no filter: sums of probabilities in float32 reach 1 before the last of them.

    Raises:
        ValueError: as check_sampling, or top_k above `size`.
    """
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    if top_k is not None and top_k > size:
        raise ValueError(f"top_k must be at most {size}, got {top_k}")
    return Sampling(
        np.float32(temperature),
        None if top_k is None else np.int32(top_k),
        None if top_p is None or np.float32(top_p) == 1 else np.float32(top_p),
    )


def keep_likeliest(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf for all but the top_k likeliest and, of those, the fewest that reach top_p.

    logits: float32[B, V]. At least the likeliest is kept; indices as likely as the last one kept
    are kept as well. top_p counts the probabilities at the given temperature, after top_k, as
    `transformers` does.
    """
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    kept = jnp.ones(falling.shape, bool)
    if sampling.top_k is not None:
        kept &= jnp.arange(falling.shape[-1], dtype=jnp.int32)[None] < sampling.top_k
    if sampling.top_p is not None:
        # greedy: all the mass is on the likeliest
        temperature = jnp.maximum(sampling.temperature, 1e-6)
        likely = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf) / temperature, axis=-1)
        before = jnp.cumsum(likely, axis=-1) - likely
        kept &= (before < sampling.top_p) | (jnp.arange(falling.shape[-1]) == 0)[None]
    last = jnp.take_along_axis(falling, jnp.sum(kept, axis=-1, keepdims=True) - 1, axis=-1)
    return jnp.where(logits >= last, logits, -jnp.inf)


def seed_words(seed: int) -> np.ndarray:
    """A seed in [0, 2**64) as uint32[2], the high word first: JAX has no uint64 by default."""
    return np.array(divmod(seed, 2**32), np.uint32)


def gumbel_noise(seed: jax.Array, index: jax.Array, step: jax.Array, size: int) -> jax.Array:
    """The noise of one draw: uint32[2], uint32[B], int32 scalar -> float32[B, size].

    A row's noise depends on nothing but the seed (see seed_words), its own index and the step: the
    key is folded with both, so no two draws share one. A key of this generator is two words, and
    jax.random.key makes [0, seed] of a seed below 2**32.
    """

    def row(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl=_GENERATOR), index)
        return jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32)

    return jax.vmap(row)(index)


def pick(logits: jax.Array, noise: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses an index a row: float32[B, V] twice -> int32[B].

    argmax(logits / temperature + noise) draws from the softmax (the Gumbel-max trick); multiplied
    by the temperature it also holds at 0, where it is the plain argmax.
    A row whose logits are not all finite gets V, which is no index: tables look it up as NaN, so
    all that follows in the row is V, too, and check_tokens finds it.
    """
    kept = keep_likeliest(logits, sampling) > -jnp.inf
    noisy = logits + sampling.temperature * noise  # may overflow
    noisy = jnp.clip(noisy, -FLOAT32_MAX, FLOAT32_MAX)
    chosen = jnp.argmax(jnp.where(kept, noisy, -jnp.inf), axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.where(finite, chosen, logits.shape[-1]).astype(jnp.int32)
