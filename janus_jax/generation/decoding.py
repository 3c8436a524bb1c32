"""Autoregressive decoding, shared by image and text generation.

B requests, R decoder rows of a request (with guidance, the prompt and the unconditional prompt),
P prompt length, D model width, V vocabulary (for image tokens, the codebook size).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.generation import samplers
from janus_jax.generation.requests import Choice, Requests, embed_prompts
from janus_jax.models.janus import Janus
from janus_jax.models.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class TokenKind:
    """What distinguishes image tokens from text tokens during decoding.

    head: (model, hidden states float[..., D]) -> logits float32[..., V].
    embed: (model, tokens int32[...]) -> float[..., D].
    """

    head: Callable[[Janus, jax.Array], jax.Array]
    embed: Callable[[Janus, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of B requests that are being decoded. They may be at different steps.

    cache: keys and values of B * R rows. The length of a row is the position of the next token that
        the decoder reads: the length of its prompt, then one more with every decode step.
    token: int32[B], the token chosen last, which the decoder has not read yet.
    step: int32[B], number of tokens chosen so far.
    limit: int32[B], maximum number of tokens.
    done: bool[B], True for a request that has ended: it reached its eos_id or its limit, or its
        logits were not finite (its token is then V). The token and the step of such a request no
        longer change.
    choice: how each request chooses its tokens.
    """

    cache: KVCache
    token: jax.Array
    step: jax.Array
    limit: jax.Array
    done: jax.Array
    choice: Choice


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


@full_float32_matmuls
@jax.named_scope("prefill")
def prefill(
    model: Janus, kind: TokenKind, requests: Requests, num_tokens: int, mesh: Mesh | None = None
) -> tuple[DecodeState, jax.Array]:
    """Runs the decoder over the prompts.

    num_tokens: the number of new tokens that the cache has room for, and the limit of requests
        without one. There is no slot for the last token, because the decoder does not read it.
    Returns the state before the first token, and the logits of that token, float32[B, V].
    """
    hidden, cache = model.language_model(embed_prompts(model, requests))
    lengths = jnp.repeat(requests.lengths, requests.choice.rows)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    cache = cache.resized(cache.size + num_tokens - 1, lengths)
    zeros = jnp.zeros_like(requests.lengths)
    state = DecodeState(
        cache=sharding.constrain_cache(cache, mesh),
        token=zeros,
        step=zeros,
        limit=zeros + num_tokens if requests.limit is None else requests.limit,
        done=zeros > 0,
        choice=requests.choice,
    )
    return state, _guided(kind.head(model, last), requests.choice)


@full_float32_matmuls
@jax.named_scope("decode_step")
def decode_step(
    model: Janus, kind: TokenKind, state: DecodeState
) -> tuple[DecodeState, jax.Array]:
    """Runs the decoder over the last token of every request.

    Returns the state with the new cache, and the logits of the next token, float32[B, V].
    """
    embeds = jnp.repeat(kind.embed(model, state.token), state.choice.rows, axis=0)
    hidden, cache = model.language_model(embeds[:, None], cache=state.cache)
    logits = _guided(kind.head(model, hidden[:, 0]), state.choice)
    return dataclasses.replace(state, cache=cache), logits


def _guided(logits: jax.Array, choice: Choice) -> jax.Array:
    """Applies classifier-free guidance: uncond + w (cond - uncond).

    logits: float32[B * R, V]; with guidance R = 2, and the cond and uncond rows alternate.
    Returns float32[B, V].
    """
    if choice.guidance_weight is None:
        return logits
    cond, uncond = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
    return uncond + choice.guidance_weight[:, None] * (cond - uncond)


def choose(state: DecodeState, logits: jax.Array) -> DecodeState:
    """Chooses the next token of every request that is not done.

    logits: float32[B, V], of that token.
    """
    choice, size = state.choice, logits.shape[-1]
    noise = samplers.gumbel_noise(choice.seed, choice.index, state.step, size)
    sampled = samplers.sample_token(logits, noise, choice.sampling)
    token = jnp.where(state.done, state.token, sampled)
    step = jnp.where(state.done, state.step, state.step + 1)
    done = state.done | (token >= size) | (step >= state.limit)
    if choice.eos_id is not None:
        done |= token == choice.eos_id
    return dataclasses.replace(state, token=token, step=step, done=done)


def begin(
    model: Janus, kind: TokenKind, requests: Requests, num_tokens: int, mesh: Mesh | None = None
) -> DecodeState:
    """Runs the prefill and chooses the first token of every request; see prefill."""
    return choose(*prefill(model, kind, requests, num_tokens, mesh))


def advance(model: Janus, kind: TokenKind, state: DecodeState) -> DecodeState:
    """Runs one decode step and chooses the next token of every request."""
    return choose(*decode_step(model, kind, state))


def advance_column(
    model: Janus, kind: TokenKind, column: jax.Array, state: DecodeState, tokens: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """Runs `advance` and writes the new tokens into one column of `tokens`, int32[B, M].

    The rows of requests that were done before are not changed.
    """
    done, before = state.done, jax.lax.dynamic_index_in_dim(tokens, column, 1, keepdims=False)
    state = advance(model, kind, state)
    values = jnp.where(done, before, state.token)
    return state, jax.lax.dynamic_update_index_in_dim(tokens, values, column, axis=1)
