"""Sampling tokens from logits: greedy, or with temperature, top-k and top-p.

B batch, V vocabulary (for image tokens, the codebook size).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from janus_jax.checks import FLOAT32_MAX, check_count, check_number

# A fixed generator, so that a user's JAX settings do not change the random numbers.
_PRNG_IMPL = "threefry2x32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of B rows are sampled. Rows may differ, or B = 1 is used for all rows.

    Values are traced: a new value needs no new compilation.

    temperature: float32[B]; 0 is greedy.
    top_k: int32[B], top_p: float32[B]. None omits the filter, and the sort that it needs, from the
        program. A row without a filter has top_k = V or top_p = 1.
    """

    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def check_sampling(temperature, top_k, top_p) -> tuple[float, int | None, float | None]:
    """Returns the settings as Python numbers.

    Raises:
        ValueError: if a setting is not a number, temperature < 0, top_k < 1, or top_p is outside
            (0, 1].
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
    """Checks the settings and returns them for sampling one row from `size` tokens.

    top_p = 1 omits the filter, because in float32 the cumulative probability reaches 1 before the
    last token.

    Raises:
        ValueError: as check_sampling, or if top_k is greater than `size`.
    """
    temperature, top_k, top_p = check_sampling(temperature, top_k, top_p)
    if top_k is not None and top_k > size:
        raise ValueError(f"top_k must be at most {size}, got {top_k}")
    no_top_p = top_p is None or np.float32(top_p) == 1
    return Sampling(
        np.array([temperature], np.float32),
        None if top_k is None else np.array([top_k], np.int32),
        None if no_top_p else np.array([top_p], np.float32),
    )


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets the logits of all tokens that top_k and top_p exclude to -inf.

    top_k keeps the k most likely tokens. Of these, top_p keeps the smallest set whose probability
    reaches top_p; as in transformers, probabilities are those at the given temperature, after
    top_k. The most likely token is always kept, and so are tokens whose logit equals the smallest
    logit kept.

    logits: float32[B, V]. Returns float32[B, V].
    """
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    keep = jnp.ones(descending.shape, bool)
    place = jnp.arange(descending.shape[-1], dtype=jnp.int32)[None]
    if sampling.top_k is not None:
        keep &= place < sampling.top_k[:, None]
    if sampling.top_p is not None:
        # at temperature 0 all probability is on the most likely token
        temperature = jnp.maximum(sampling.temperature, 1e-6)[:, None]
        probs = jax.nn.softmax(jnp.where(keep, descending, -jnp.inf) / temperature, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        top_p = sampling.top_p[:, None]
        keep &= (before < top_p) | (place == 0) | (top_p == 1)
    smallest = jnp.take_along_axis(descending, jnp.sum(keep, axis=-1, keepdims=True) - 1, axis=-1)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def seed_words(seed: int) -> np.ndarray:
    """Splits a seed in [0, 2**64) into uint32[2], high word first.

    By default JAX has no uint64.
    """
    return np.array(divmod(seed, 2**32), np.uint32)


def gumbel_noise(seed: jax.Array, index: jax.Array, step: jax.Array, size: int) -> jax.Array:
    """Returns Gumbel noise for one step of each row: float32[B, size].

    seed: uint32[B, 2], one result of seed_words per row.
    index: uint32[B].
    step: int32[B].

    The noise of a row depends only on its seed, index and step: the latter two are folded into the
    key, so each pair has its own key. A threefry key consists of two words; for a seed below
    2**32, jax.random.key makes the same key, [0, seed].
    """

    def row(seed: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl=_PRNG_IMPL), index)
        return jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32)

    return jax.vmap(row)(seed, index, step)


def sample_token(logits: jax.Array, noise: jax.Array, sampling: Sampling) -> jax.Array:
    """Samples one token per row by the Gumbel-max trick.

    logits: float32[B, V].
    noise: float32[B, V], as gumbel_noise returns it.
    Returns int32[B].

    argmax(logits / temperature + noise) is a sample from the softmax. Both terms are multiplied by
    the temperature, so that temperature 0 gives the plain argmax.

    A row whose logits are not all finite gets V. This is not a token: it ends the row, and the host
    detects it (text.check_tokens, image.check_generated).
    """
    keep = filter_logits(logits, sampling) > -jnp.inf
    noisy = logits + sampling.temperature[:, None] * noise
    # a large temperature may overflow
    noisy = jnp.clip(noisy, -FLOAT32_MAX, FLOAT32_MAX)
    sampled = jnp.argmax(jnp.where(keep, noisy, -jnp.inf), axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.where(finite, sampled, logits.shape[-1]).astype(jnp.int32)
