"""Writing text: a conversation with images -> tokens, until the end of the sentence.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What to answer, one entry a conversation.

    tokens, token_mask, image_mask, pixels: as processing.Batch has them, padded to a bucket.
    seed: uint32[2], of samplers.seed_words; every row has the same noise, so that a conversation
        gets in a batch the answer it gets alone.
    sampling: how tokens are chosen.
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
class Writing:
    """Answers under way.

    last: int32[B], the token chosen last, not read yet.
    done: bool[B], True once a row has ended; from then on it writes eos_id.
    step: int32 scalar, how many tokens are chosen.
    context: the decoder's.
    """

    last: jax.Array
    done: jax.Array
    step: jax.Array
    context: decoding.Context


def embed_prompts(model: Janus, requests: Requests) -> jax.Array:
    """Token embeddings with the images' features in their slots, float[B, P, D]."""
    embeds = model.language_model.embed(requests.tokens)
    batch, images = requests.pixels.shape[:2]
    if not images:
        return embeds
    features = model.encode_images(requests.pixels.reshape(-1, *requests.pixels.shape[2:]))
    features = features.reshape(batch, -1, features.shape[-1])
    return merge_features(embeds, requests.image_mask, features)


@decoding.in_full_float32
def prefill(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> tuple[jax.Array, decoding.Context]:
    """Reads the conversations; returns the first new token's logits, float32[B, V]."""
    embeds = embed_prompts(model, requests)
    # the last token is never read, so it needs no slot
    hidden, context = decoding.prefill(
        model.language_model, embeds, requests.token_mask, max_new_tokens - 1, mesh
    )
    return model.language_model.logits(hidden), context


@decoding.in_full_float32
def decode_step(
    model: Janus, context: decoding.Context, tokens: jax.Array
) -> tuple[jax.Array, decoding.Context]:
    """Reads one token of every answer, int32[B]; returns the next one's logits, float32[B, V]."""
    embeds = model.language_model.embed(tokens)
    hidden, context = decoding.decode_step(model.language_model, context, embeds)
    return model.language_model.logits(hidden), context


def _choose(requests: Requests, logits: jax.Array, step, done: jax.Array) -> jax.Array:
    index = jnp.zeros(len(logits), jnp.uint32)
    noise = samplers.gumbel_noise(requests.seed, index, step, logits.shape[-1])
    chosen = samplers.pick(logits, noise, requests.sampling)
    return jnp.where(done, requests.eos_id, chosen)


def _ends(model: Janus, requests: Requests, chosen: jax.Array) -> jax.Array:
    """Where tokens end an answer, bool[B]: at eos_id, and where pick had no finite logits."""
    return (chosen == requests.eos_id) | (chosen >= model.cfg.language_model.vocab_size)


def begin(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> Writing:
    """Reads the conversations and chooses the first token of every answer."""
    logits, context = prefill(model, requests, max_new_tokens, mesh)
    first = _choose(requests, logits, 0, jnp.zeros(len(logits), bool))
    return Writing(first, _ends(model, requests, first), jnp.ones((), jnp.int32), context)


def write_token(model: Janus, requests: Requests, writing: Writing) -> Writing:
    """Reads the token chosen last and chooses the next."""
    logits, context = decode_step(model, writing.context, writing.last)
    chosen = _choose(requests, logits, writing.step, writing.done)
    done = writing.done | _ends(model, requests, chosen)
    return Writing(chosen, done, writing.step + 1, context)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "mesh"))
def write(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> jax.Array:
    """The whole way in one program: new tokens, int32[B, M], filled up with eos_id.

    Stops when every row has ended. The reference fills with the pad id that its demos set to eos.
    """

    def under_way(carry) -> jax.Array:
        writing, _ = carry
        return (writing.step < max_new_tokens) & ~jnp.all(writing.done)

    def step(carry):
        writing, tokens = carry
        writing = write_token(model, requests, writing)
        column = writing.step - 1
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, writing.last, column, axis=1)
        return writing, tokens

    writing = begin(model, requests, max_new_tokens, mesh)
    tokens = jnp.full((len(requests.tokens), max_new_tokens), requests.eos_id, jnp.int32)
    tokens = tokens.at[:, 0].set(writing.last)
    _, tokens = jax.lax.while_loop(under_way, step, (writing, tokens))
    return sharding.replicate(tokens, mesh)


_begin = jax.jit(begin, static_argnames=("max_new_tokens", "mesh"))


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="writing")
def _write_token(structure, parameters, requests: Requests, writing: Writing) -> Writing:
    """write_token of a model taken apart, which done anew would take as long as a token."""
    return write_token(jax.tree.unflatten(structure, parameters), requests, writing)


def stream(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> Iterator[int]:
    """The tokens of a single answer as they come, without the eos_id that ends it.

    Raises:
        ValueError: features or logits that are not finite.
    """
    parameters, structure = jax.tree.flatten(model)
    writing = _begin(model, requests, max_new_tokens, mesh)
    for step in range(1, max_new_tokens + 1):
        token = int(writing.last[0])
        check_tokens(model, requests, token, mesh)
        if token == int(requests.eos_id):
            return
        yield token
        if step < max_new_tokens:
            writing = _write_token(structure, parameters, requests, writing)


def check_tokens(
    model: Janus, requests: Requests, tokens: np.ndarray | int, mesh: Mesh | None = None
) -> None:
    """Raises ValueError if the logits that tokens were chosen from, or features, were not finite.

    Features are computed again, and only then: if they are not finite, neither are the logits of
    their row.
    """
    if np.max(tokens) < model.cfg.language_model.vocab_size:
        return
    if requests.pixels.shape[1]:
        encoded, aligned = _finite_features(model, requests.pixels, mesh)
        if not encoded:
            raise finite.not_finite("SigLIP features", {"und_encoder": model.und_encoder})
        if not aligned:
            raise finite.not_finite("aligned image features", {"und_aligner": model.und_aligner})
    raise finite.not_finite("text logits", {"language_model": model.language_model})


@functools.partial(jax.jit, static_argnames="mesh")
def _finite_features(
    model: Janus, pixels: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Whether all SigLIP features, and these after the aligner, are finite: bool scalars."""
    encoded = model.und_encoder(pixels.reshape(-1, *pixels.shape[2:]))
    parts = encoded, model.und_aligner(encoded)
    return sharding.replicate(tuple(jnp.all(jnp.isfinite(part)) for part in parts), mesh)


def make_requests(
    batch, seed: int, sampling: Sampling, eos_id: int, mesh: Mesh | None = None
) -> Requests:
    """Requests on the devices, from a processing.processor.Batch."""
    arrays = (batch.tokens, batch.token_mask, batch.image_mask, batch.pixels)
    words = samplers.seed_words(seed)
    return Requests(*sharding.put_batch(arrays, mesh), words, sampling, np.int32(eos_id))
