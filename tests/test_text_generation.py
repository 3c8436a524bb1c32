"""Text generation: compared with recordings of the original, alone, in batches and streamed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.generation import chunks, decoding, samplers, text
from janus_jax.generation.requests import embed_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")

NEW = 12


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "janus_llm.npz")


@pytest.fixture(scope="module")
def conversations(golden):
    """The three recorded conversations and the paths of their images."""
    stored = json.loads((golden / "processor.json").read_text())
    system = {"role": "system", "content": stored["system_prompt_short"]}
    messages = [[system, *turns] for turns in stored["conversations"]]
    return messages, [[golden / name for name in names] for names in stored["images"]]


@pytest.fixture(scope="module")
def requests(pipeline, conversations):
    """Requests for the recorded batch, greedy, with an eos_id that no token equals."""
    processor = pipeline.processor
    examples = [processor.conversation(*pair) for pair in zip(*conversations, strict=True)]
    batch = processor.batch(examples)
    return text.make_requests(batch, 0, samplers.make_sampling(0, None, None, 448), -1)


def test_prompts_are_those_of_the_original(requests, golden):
    """The recorded prompts are padded on the left."""
    recorded = np.load(golden / "janus_processor.npz")
    mask = recorded["attention_mask"] == 1
    np.testing.assert_array_equal(requests.lengths, mask.sum(1))
    for row, length, expected in zip(
        requests.tokens, requests.lengths, recorded["input_ids"], strict=True
    ):
        np.testing.assert_array_equal(row[0, :length], expected[-length:])


def test_embedded_prompts_are_those_of_the_original(pipeline, requests, golden):
    embeds = jax.jit(embed_prompts)(pipeline.model, requests)
    expected = np.load(golden / "janus_embeds.npz")["inputs_embeds"]
    for row, length, other in zip(embeds, requests.lengths, expected, strict=True):
        np.testing.assert_allclose(row[:length], other[-length:], atol=1e-5, rtol=1e-5)


def test_logits_of_every_step_are_those_of_the_original(pipeline, requests, recorded):
    prefill = jax.jit(decoding.prefill, static_argnames=("kind", "num_tokens"))
    decode_step = jax.jit(decoding.decode_step, static_argnames="kind")
    state, logits = prefill(pipeline.model, text.TEXT_KIND, requests, NEW)
    seen = [logits]
    for step in range(NEW - 1):
        tokens = jnp.asarray(recorded["greedy_tokens"][:, step])
        state = dataclasses.replace(state, token=tokens)
        state, logits = decode_step(pipeline.model, text.TEXT_KIND, state)
        seen.append(logits)
    np.testing.assert_allclose(np.stack(seen), recorded["greedy_logits"], atol=1e-4, rtol=1e-4)
    assert int(state.cache.lengths.max()) == state.cache.size  # no slot too many


def test_greedy_tokens_are_those_of_the_original(pipeline, requests, recorded):
    tokens = text.generate_tokens(pipeline.model, requests, NEW)
    np.testing.assert_array_equal(tokens, recorded["greedy_tokens"])


def with_eos(requests, eos_id):
    eos_id = jnp.full_like(requests.choice.eos_id, eos_id)
    return dataclasses.replace(
        requests, choice=dataclasses.replace(requests.choice, eos_id=eos_id)
    )


def test_rows_that_ended_are_filled_with_the_stop_token(pipeline, requests, recorded):
    stopping = with_eos(requests, recorded["eos_id"])
    text.generate_tokens(pipeline.model, requests, NEW)
    before = text.generate_tokens._cache_size()  # another stop token needs no other program
    tokens = np.asarray(text.generate_tokens(pipeline.model, stopping, NEW))
    assert text.generate_tokens._cache_size() == before
    filled = recorded["eos_tokens"].copy()
    for row in filled:  # the original fills with the pad id, which its demos set to the stop token
        ends = np.flatnonzero(row == recorded["eos_id"])
        row[ends[0] if len(ends) else NEW :] = recorded["eos_id"]
    np.testing.assert_array_equal(tokens, filled)
    first = recorded["eos_row0_tokens"][0]
    np.testing.assert_array_equal(tokens[0, : len(first)], first)


def test_writing_stops_when_every_row_has_ended(pipeline, requests, recorded, monkeypatch):
    stopping = with_eos(requests.select(np.arange(1)), recorded["eos_id"])
    expected = recorded["eos_row0_tokens"][0].tolist()
    streamed = list(text.stream(pipeline.model, stopping, NEW))
    assert [*streamed, int(recorded["eos_id"])] == expected

    steps, advance = [], decoding.advance

    def counted(model, kind, state):
        jax.debug.callback(lambda step: steps.append(int(step[0])), state.step)
        return advance(model, kind, state)

    monkeypatch.setattr(decoding, "advance", counted)
    generate_tokens = jax.jit(
        text.generate_tokens.__wrapped__, static_argnames="max_new_tokens"
    )
    jax.block_until_ready(generate_tokens(pipeline.model, stopping, max_new_tokens=NEW))
    jax.effects_barrier()
    assert sorted(steps) == list(range(1, len(expected)))


def test_a_batch_of_unequal_conversations_gives_the_answers_of_each_alone(small, conversations):
    messages, images = conversations
    settings = {"max_new_tokens": NEW, "temperature": 0.8, "seed": 5}
    batch = small.answer(messages, images, **settings)
    alone = [small.answer(m, i, **settings) for m, i in zip(*conversations, strict=True)]
    assert batch == alone
    assert len(set(batch)) == 3


@pytest.mark.parametrize("by_memory", [True, False])
def test_chunks_of_conversations_give_the_same_answers(
    small, conversations, by_memory, monkeypatch
):
    settings = {"max_new_tokens": NEW, "temperature": 0.8, "seed": 5}
    expected = small.answer(*conversations, **settings)
    sizes, generate_tokens = [], text.generate_tokens

    def counted(model, requests, *rest):
        sizes.append(len(requests.tokens))
        return generate_tokens(model, requests, *rest)

    monkeypatch.setattr(text, "generate_tokens", counted)
    if by_memory:
        monkeypatch.setattr(chunks, "CACHE_BYTES", 1)
    else:
        settings["max_batch"] = 2
    assert small.answer(*conversations, **settings) == expected
    assert sizes == ([1, 1, 1] if by_memory else [2, 2])


def test_two_images_in_one_row_and_none_in_the_other(small, golden):
    images = [golden / "preprocess" / name for name in ("img0_50x120.png", "img2_64x64.png")]
    questions = ["Which is larger?", "Hello"]
    batch = small.answer(questions, [images, []], max_new_tokens=NEW)
    assert batch[0] == small.answer(questions[0], images, max_new_tokens=NEW)
    assert batch[0] != small.answer(questions[0], images[::-1], max_new_tokens=NEW)
    assert batch[1] == small.answer(questions[1], max_new_tokens=NEW)


def test_sampling_follows_the_seed(small):
    ask = functools.partial(small.answer, "Hello", max_new_tokens=NEW, temperature=1.5)
    assert ask(seed=1) == ask(seed=1)
    assert ask(seed=1) != ask(seed=2)
    assert ask(seed=1, top_k=1) == small.answer("Hello", max_new_tokens=NEW)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pieces_of_a_stream_join_to_the_answer(small, golden, temperature):
    args = ("Was ist das?", golden / "preprocess" / "img0_50x120.png")
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 2}
    pieces = list(small.stream(*args, **settings))
    assert len(pieces) > 2
    assert "".join(pieces) == small.answer(*args, **settings)


def test_a_character_of_several_tokens_is_one_piece(small, monkeypatch):
    tokens = small.processor.tokenizer.encode("aé😀!")[1:]
    assert len(tokens) > 4
    monkeypatch.setattr(text, "stream", lambda *_: iter(tokens))
    assert list(small.stream("Hello")) == ["a", "é", "😀", "!"]
    monkeypatch.setattr(text, "stream", lambda *_: iter(tokens[:-2]))
    assert list(small.stream("Hello")) == ["a", "é", "\ufffd"]


def test_one_new_token_is_enough(small):
    answer = small.answer("Hello", max_new_tokens=NEW)
    first = small.answer("Hello", max_new_tokens=1)
    assert first and answer.startswith(first)
