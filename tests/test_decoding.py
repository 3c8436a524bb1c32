"""Decoding requests that differ in every setting, at different steps, and from prompts with images.

A tiny random model; B requests, P = 24 tokens of a prompt.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import IMAGE_TOKEN, tiny_pair, uniform

from janus_jax.generation import decoding, image, samplers, text
from janus_jax.generation.decoding import DecodeState
from janus_jax.generation.requests import Choice, Requests, embed_prompts
from janus_jax.generation.samplers import Sampling

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH, NEW = 24, 8

begin = jax.jit(decoding.begin, static_argnames=("kind", "num_tokens"))
advance = jax.jit(decoding.advance, static_argnames="kind")
advance_column = jax.jit(decoding.advance_column, static_argnames="kind")


@pytest.fixture(scope="module")
def model():
    return tiny_pair()[1]


def make_request(
    length: int, seed: int, sampling: tuple, weight=None, eos_id=None, index=0
) -> Requests:
    """One request with a random prompt of `length` tokens; the padding is random, too."""
    rows = 1 if weight is None else 2
    tokens = np.random.default_rng(length).integers(0, 95, (1, rows, LENGTH)).astype(np.int32)
    temperature, top_k, top_p = sampling
    return Requests(
        tokens=tokens,
        lengths=np.array([length], np.int32),
        image_mask=np.zeros(tokens.shape, bool),
        pixels=np.zeros((1, 0, 16, 16, 3), np.float32),
        choice=Choice(
            seed=samplers.seed_words(seed)[None],
            index=np.array([index], np.uint32),
            sampling=Sampling(
                np.array([temperature], np.float32),
                np.array([top_k], np.int32),
                np.array([top_p], np.float32),
            ),
            guidance_weight=None if weight is None else np.array([weight], np.float32),
            eos_id=None if eos_id is None else np.array([eos_id], np.int32),
        ),
    )


IMAGES = [
    make_request(5, 1, (0.0, 40, 1.0), weight=3.0),
    make_request(24, 2**40, (1.0, 40, 1.0), weight=1.0, index=7),
    make_request(17, 3, (2.0, 5, 0.8), weight=-1.5, index=2),
]
TEXTS = [
    make_request(24, 4, (1.0, 96, 0.9), eos_id=3),
    make_request(1, 2**63, (1.5, 7, 1.0), eos_id=2, index=1),
    make_request(9, 4, (0.0, 96, 1.0), eos_id=5),
]
CASES = pytest.mark.parametrize(
    ("kind", "requests"), [(image.IMAGE_KIND, IMAGES), (text.TEXT_KIND, TEXTS)]
)


def joined(parts):
    """The rows of several requests or states in one batch."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def run_to_end(model, kind, state: DecodeState) -> np.ndarray:
    """The tokens from the state's last one on, int32[B, n], until all requests are done."""
    tokens = [state.token]
    while not np.all(state.done):
        state = advance(model, kind, state)
        tokens.append(state.token)
    return np.stack(tokens, axis=1)


@CASES
def test_requests_that_differ_in_everything_give_in_a_batch_what_each_gives_alone(
    model, kind, requests
):
    alone = [run_to_end(model, kind, begin(model, kind, r, NEW))[0] for r in requests]
    batch = run_to_end(model, kind, begin(model, kind, joined(requests), NEW))
    assert len({tuple(row) for row in alone}) == 3
    for row, expected in zip(batch, alone, strict=True):
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == expected[-1]).all()  # a request that is done stays as it is


@CASES
def test_requests_at_different_steps_advance_together(model, kind, requests):
    """As in the slots of a server: the second request joins after three steps of the first."""
    expected = [run_to_end(model, kind, begin(model, kind, r, NEW))[0] for r in requests[:2]]
    first = begin(model, kind, requests[0], NEW)
    for _ in range(3):
        first = advance(model, kind, first)
    both = joined([first, begin(model, kind, requests[1], NEW)])
    np.testing.assert_array_equal(both.step, [4, 1])
    rows = run_to_end(model, kind, both)
    for row, tokens in zip(rows, (expected[0][3:], expected[1]), strict=True):
        np.testing.assert_array_equal(row[: len(tokens)], tokens)


def test_a_request_ends_at_its_limit_or_its_eos_id(model):
    state = begin(model, text.TEXT_KIND, joined(TEXTS), NEW)
    logits = jnp.zeros((3, 96)).at[0, 3].set(9.0).at[1, 3].set(9.0).at[2, 1].set(jnp.nan)
    state = jax.jit(decoding.choose)(state, logits.at[1:].multiply(50))
    np.testing.assert_array_equal(state.done, [True, False, True])
    np.testing.assert_array_equal(state.token, [3, 3, 96])
    for _ in range(NEW):
        state = jax.jit(decoding.choose)(state, jnp.zeros((3, 96)).at[:, 4].set(500.0))
    np.testing.assert_array_equal(state.step, [2, NEW, 2])
    np.testing.assert_array_equal(state.token, [3, 4, 96])
    assert state.done.all()


def test_each_request_has_its_own_limit(model):
    requests = dataclasses.replace(joined(TEXTS), limit=np.array([2, 4, 3], np.int32))
    state = begin(model, text.TEXT_KIND, requests, NEW)
    tokens = jnp.full((3, NEW), -1).at[:, 0].set(state.token)
    for column in range(1, NEW):
        state, tokens = advance_column(model, text.TEXT_KIND, column, state, tokens)
    assert state.done.all()
    np.testing.assert_array_equal((tokens >= 0).sum(1), state.step)
    assert (state.step <= requests.limit).all() and state.step[1] == 4


@pytest.fixture(scope="module")
def edits() -> Requests:
    """Two greedy requests for images whose prompts hold one image; only one of the unconditional
    prompts holds it, too."""
    parts = [make_request(n, 0, (0.0, 40, 1.0), weight=2.0) for n in (24, 20)]
    requests = joined(parts)
    requests.image_mask[0, :, 3:19] = requests.image_mask[1, :1, 2:18] = True
    requests.tokens[requests.image_mask] = IMAGE_TOKEN
    pixels = uniform(2, 1, 16, 16, 3, seed=6)
    return Requests(
        requests.tokens, requests.lengths, requests.image_mask, pixels, requests.choice
    )


def naive_prompts(model, requests: Requests) -> list[np.ndarray]:
    """Embeddings of the two rows of each request without padding, float[2, length, D]."""
    features = np.asarray(jax.jit(type(model).encode_images)(model, requests.pixels[:, 0]))
    prompts = []
    for i, length in enumerate(requests.lengths):
        rows = np.array(model.language_model.embed(requests.tokens[i, :, :length]))
        for row, mask in zip(rows, requests.image_mask[i, :, :length], strict=True):
            if mask.any():
                row[mask] = features[i]
        prompts.append(rows)
    return prompts


def test_prompts_hold_images_in_both_rows_or_in_one(model, edits):
    embeds = jax.jit(embed_prompts)(model, edits).reshape(2, 2, LENGTH, -1)
    for found, expected in zip(embeds, naive_prompts(model, edits), strict=True):
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-6)


def test_images_from_prompts_with_images_equal_full_forward_passes(model, edits):
    """Each token from a forward pass over the whole sequence, as for editing an image."""

    @jax.jit
    def next_logits(model, embeds, last):
        hidden, _ = model.language_model(embeds)  # later positions do not change earlier ones
        return model.gen_head(hidden[:, last])

    expected = []
    for rows in naive_prompts(model, edits):
        start, chosen = rows.shape[1], []
        embeds = np.pad(rows, ((0, 0), (0, 24 + 16 - start), (0, 0)))  # one program for both
        for step in range(16):
            cond, uncond = next_logits(model, embeds, start + step - 1)
            chosen.append(int(jnp.argmax(uncond + 2.0 * (cond - uncond))))
            embeds[:, start + step] = model.embed_image_tokens(jnp.array(chosen[-1:]))
        expected.append(chosen)
    decoded = image.generate_batch(model, edits)
    np.testing.assert_array_equal(decoded.indices, expected)
    without = Requests(
        edits.tokens, edits.lengths, edits.image_mask, edits.pixels + 1, edits.choice
    )
    assert (image.generate_batch(model, without).indices != decoded.indices).any()
