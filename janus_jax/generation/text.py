"""Text generation: a conversation with images -> the tokens of the answer.

B conversations, P prompt length, M new tokens, V vocabulary.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.generation import decoding, finite
from janus_jax.generation.decoding import DecodeState, TokenKind
from janus_jax.generation.requests import Requests, make_choice
from janus_jax.generation.samplers import Sampling
from janus_jax.models.janus import Janus

TEXT_KIND = TokenKind(
    head=lambda model, hidden: model.language_model.lm_head(hidden),
    embed=lambda model, tokens: model.language_model.embed(tokens),
)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "mesh"))
def generate_tokens(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> jax.Array:
    """Generates the answers in one program.

    The loop stops when all answers have ended. requests.choice.eos_id must not be None. Returns the
    new tokens, int32[B, M], padded with eos_id. The original code pads with the pad id, which its
    demos set to the eos id.
    """

    def unfinished(carry) -> jax.Array:
        _, state, _ = carry
        return ~jnp.all(state.done)

    def body(carry):
        column, state, tokens = carry
        return column + 1, *decoding.advance_column(model, TEXT_KIND, column, state, tokens)

    state = decoding.begin(model, TEXT_KIND, requests, max_new_tokens, mesh)
    tokens = jnp.repeat(requests.choice.eos_id[:, None], max_new_tokens, axis=1)
    tokens = tokens.at[:, 0].set(state.token)
    _, _, tokens = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state, tokens))
    return sharding.replicate(tokens, mesh)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "mesh"))
def begin_answers(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> DecodeState:
    """Runs the prefill and chooses the first token of every answer."""
    return decoding.begin(model, TEXT_KIND, requests, max_new_tokens, mesh)


@functools.partial(jax.jit, static_argnames="treedef", donate_argnames="state")
def advance_answers(treedef, leaves, state: DecodeState) -> DecodeState:
    """decoding.advance of a flattened model.

    jit would flatten the model at each call, which takes as long as a token.
    """
    return decoding.advance(jax.tree.unflatten(treedef, leaves), TEXT_KIND, state)


def stream(
    model: Janus, requests: Requests, max_new_tokens: int, mesh: Mesh | None = None
) -> Iterator[int]:
    """Yields the tokens of a single answer one by one, without the eos_id that ends it.

    requests: one request, whose choice.eos_id is not None.

    Raises:
        ValueError: if image features or logits are NaN or infinite.
    """
    leaves, treedef = jax.tree.flatten(model)
    eos_id = int(requests.choice.eos_id[0])
    state = begin_answers(model, requests, max_new_tokens, mesh)
    for step in range(1, max_new_tokens + 1):
        token = int(state.token[0])
        check_tokens(model, requests, token, mesh)
        if token == eos_id:
            return
        yield token
        if step < max_new_tokens:
            state = advance_answers(treedef, leaves, state)


def check_tokens(
    model: Janus, requests: Requests, tokens: np.ndarray | int, mesh: Mesh | None = None
) -> None:
    """Raises ValueError if the tokens were computed from NaN or infinite features or logits.

    A token V stands for such logits.
    """
    if np.max(tokens) < model.cfg.language_model.vocab_size:
        return
    finite.check_features(model, requests.pixels, mesh)
    raise finite.not_finite_error("text logits", {"language_model": model.language_model})


def make_requests(
    batch, seed: int, sampling: Sampling, eos_id: int, mesh: Mesh | None = None
) -> Requests:
    """Makes the requests for a processing.processor.Batch and puts its arrays on the devices.

    The padding moves from the left to the right of the tokens. All requests use the same noise, so
    that a conversation gets the same answer alone and in a batch.

    sampling: the settings of every answer, as samplers.make_sampling returns them.
    """
    lengths = batch.token_mask.sum(axis=1, dtype=np.int32)
    index = np.zeros(len(lengths), np.uint32)
    requests = Requests(
        tokens=_rolled(batch.tokens, lengths)[:, None],
        lengths=lengths,
        image_mask=_rolled(batch.image_mask, lengths)[:, None],
        pixels=batch.pixels,
        choice=make_choice(index, seed, sampling, eos_id=eos_id),
    )
    return sharding.put_batch(requests, mesh)


def _rolled(rows: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Returns each row shifted to the right by its own number of places, circularly."""
    return np.stack([np.roll(row, shift) for row, shift in zip(rows, shifts, strict=True)])
