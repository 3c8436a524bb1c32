"""Text generation: a conversation with images -> the tokens of the answer.

B conversations, P prompt length, M new tokens, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.generation import decoding, finite, samplers
from janus_jax.generation.samplers import Sampling
from janus_jax.models.janus import Janus, merge_features
from janus_jax.models.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch of conversations to answer.

    tokens, token_mask, image_mask, pixels: as in processing.processor.Batch, padded to a bucket
        length.
    seed: uint32[2], as samplers.seed_words returns it. Every row has the same noise, so that a
        conversation gets the same answer alone and in a batch.
    sampling: how tokens are sampled.
    eos_id: int32 scalar, the token that ends an answer.
    """

    tokens: jax.Array
    token_mask: jax.Array
    image_mask: jax.Array
    pixels: jax.Array
    seed: np.ndarray
    sampling: Sampling
    eos_id: np.int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the token loop.

    last: int32[B], the token sampled last, which the decoder has not read yet.
    done: bool[B], True for answers that have ended; all further tokens of these are eos_id.
    step: int32 scalar, number of tokens sampled so far.
    cache: what the decoder has read.
    """

    last: jax.Array
    done: jax.Array
    step: jax.Array
    cache: KVCache


def embed_prompts(model: Janus, requests: Requests) -> jax.Array:
    """Embeds the prompts, with image features in the places of the images: float[B, P, D]."""
    embeds = model.language_model.embed(requests.tokens)
    batch, images = requests.pixels.shape[:2]
    if not images:
        return embeds
    features = model.encode_images(requests.pixels.reshape(-1, *requests.pixels.shape[2:]))
    features = features.reshape(batch, -1, features.shape[-1])
    return merge_features(embeds, requests.image_mask, features)


@decoding.full_float32_matmuls
def prefill(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder over the conversations.

    Returns the logits of the first new token, float32[B, V], and the cache.
    """
    embeds = embed_prompts(model, requests)
    # the decoder does not read the last token, which therefore needs no cache slot
    hidden, cache = decoding.prefill(
        model.language_model, embeds, requests.token_mask, max_new_tokens - 1, mesh
    )
    return model.language_model.lm_head(hidden), cache


@decoding.full_float32_matmuls
def decode_step(
    model: Janus, cache: KVCache, tokens: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder over one token per answer.

    tokens: int32[B].
    Returns the logits of the next token, float32[B, V], and the new cache.
    """
    embeds = model.language_model.embed(tokens)
    hidden, cache = decoding.decode_step(model.language_model, cache, embeds)
    return model.language_model.lm_head(hidden), cache


def _sample(requests: Requests, logits: jax.Array, step, done: jax.Array) -> jax.Array:
    """Samples token number `step` of every answer, or eos_id where it is done: int32[B]."""
    index = jnp.zeros(len(logits), jnp.uint32)
    noise = samplers.gumbel_noise(requests.seed, index, step, logits.shape[-1])
    sampled = samplers.sample_token(logits, noise, requests.sampling)
    return jnp.where(done, requests.eos_id, sampled)


def _ends_answer(model: Janus, requests: Requests, tokens: jax.Array) -> jax.Array:
    """Returns where a token ends its answer, bool[B].

    An answer ends at eos_id, and at the token V, which stands for logits that are not finite.
    """
    return (tokens == requests.eos_id) | (tokens >= model.cfg.language_model.vocab_size)


def init_state(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> DecodeState:
    """Runs the prefill and samples the first token of every answer."""
    logits, cache = prefill(model, requests, max_new_tokens, mesh)
    first = _sample(requests, logits, 0, jnp.zeros(len(logits), bool))
    done = _ends_answer(model, requests, first)
    return DecodeState(first, done, jnp.ones((), jnp.int32), cache)


def generate_next_token(model: Janus, requests: Requests, state: DecodeState) -> DecodeState:
    """Runs one decode step on the last token of every answer and samples the next token."""
    logits, cache = decode_step(model, state.cache, state.last)
    sampled = _sample(requests, logits, state.step, state.done)
    done = state.done | _ends_answer(model, requests, sampled)
    return DecodeState(sampled, done, state.step + 1, cache)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "mesh"))
def generate_tokens(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> jax.Array:
    """Generates the answers in one program.

    The loop stops when all answers have ended. Returns the new tokens, int32[B, M], padded with
    eos_id. The original code pads with the pad id, which its demos set to the eos id.
    """

    def unfinished(carry) -> jax.Array:
        state, _ = carry
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def body(carry):
        state, tokens = carry
        state = generate_next_token(model, requests, state)
        column = state.step - 1
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, state.last, column, axis=1)
        return state, tokens

    state = init_state(model, requests, max_new_tokens, mesh)
    tokens = jnp.full((len(requests.tokens), max_new_tokens), requests.eos_id, jnp.int32)
    tokens = tokens.at[:, 0].set(state.last)
    _, tokens = jax.lax.while_loop(unfinished, body, (state, tokens))
    return sharding.replicate(tokens, mesh)


_init_state = jax.jit(init_state, static_argnames=("max_new_tokens", "mesh"))


@functools.partial(jax.jit, static_argnames="treedef", donate_argnames="state")
def _generate_next_token(treedef, leaves, requests: Requests, state: DecodeState) -> DecodeState:
    """generate_next_token of a flattened model.

    jit would flatten the model at each call, which takes as long as a token.
    """
    return generate_next_token(jax.tree.unflatten(treedef, leaves), requests, state)


def stream(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> Iterator[int]:
    """Yields the tokens of a single answer one by one, without the eos_id that ends it.

    Raises:
        ValueError: if image features or logits are NaN or infinite.
    """
    leaves, treedef = jax.tree.flatten(model)
    state = _init_state(model, requests, max_new_tokens, mesh)
    for step in range(1, max_new_tokens + 1):
        token = int(state.last[0])
        check_tokens(model, requests, token, mesh)
        if token == int(requests.eos_id):
            return
        yield token
        if step < max_new_tokens:
            state = _generate_next_token(treedef, leaves, requests, state)


def check_tokens(
    model: Janus, requests: Requests, tokens: np.ndarray | int, mesh: Mesh | None = None
) -> None:
    """Raises ValueError if the tokens were computed from NaN or infinite features or logits.

    A token V stands for such logits. If there is one, this function computes the image features
    again to name the module that failed first: features that are not finite make the logits of
    their row not finite.
    """
    if np.max(tokens) < model.cfg.language_model.vocab_size:
        return
    if requests.pixels.shape[1]:
        encoded, aligned = _finite_features(model, requests.pixels, mesh)
        if not encoded:
            raise finite.not_finite_error("SigLIP features", {"und_encoder": model.und_encoder})
        if not aligned:
            modules = {"und_aligner": model.und_aligner}
            raise finite.not_finite_error("aligned image features", modules)
    raise finite.not_finite_error("text logits", {"language_model": model.language_model})


@functools.partial(jax.jit, static_argnames="mesh")
def _finite_features(
    model: Janus, pixels: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Returns whether all SigLIP features, and all aligned features, are finite: bool scalars."""
    encoded = model.und_encoder(pixels.reshape(-1, *pixels.shape[2:]))
    features = encoded, model.und_aligner(encoded)
    return sharding.replicate(tuple(jnp.all(jnp.isfinite(x)) for x in features), mesh)


def make_requests(
    batch, seed: int, sampling: Sampling, eos_id: int, mesh: Mesh | None = None
) -> Requests:
    """Makes the requests for a processing.processor.Batch and puts its arrays on the devices."""
    arrays = (batch.tokens, batch.token_mask, batch.image_mask, batch.pixels)
    words = samplers.seed_words(seed)
    return Requests(*sharding.put_batch(arrays, mesh), words, sampling, np.int32(eos_id))
