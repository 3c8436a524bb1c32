"""Image generation: compared with recordings of the original, and what must not change it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_janus import empty_cache

from janus_jax.generation import chunks, codec, decoding, image, samplers

PROMPT = "A close-up photo of a red cat, studio light."
OTHER = "a dog"


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "janus_t2i.npz")


@pytest.fixture(scope="module")
def requests(pipeline, golden):
    """Requests for two images of the recorded prompt, greedy."""
    settings = json.loads((golden / "t2i.json").read_text())
    return _requests(pipeline, [PROMPT], settings["parallel_size"], settings["cfg_weight"])


def _requests(pipeline, prompts, num_images, guidance_weight=5.0, temperature=0.0, seed=0):
    processor = pipeline.processor
    tokens = [processor.image_prompt(prompt) for prompt in prompts]
    sampling = samplers.make_sampling(temperature, None, None, 128)
    pairs = [(row, processor.unconditional(row)) for row in tokens]
    pad = processor.tokenizer.pad_id
    return image.make_requests(pairs, num_images, seed, guidance_weight, sampling, pad)


_prefill = jax.jit(decoding.prefill, static_argnames=("kind", "num_tokens"))
_decode_step = jax.jit(decoding.decode_step, static_argnames="kind")


def _walk(pipeline, requests, choose):
    """Generates step by step with choose(step, logits) -> indices; returns logits and indices."""
    model, num_tokens = pipeline.model, pipeline.model.cfg.num_image_tokens
    state, logits = _prefill(model, image.IMAGE_KIND, requests, num_tokens)
    seen, chosen = [logits], [choose(0, logits)]
    for step in range(1, num_tokens):
        state = dataclasses.replace(state, token=jnp.asarray(chosen[-1]))
        state, logits = _decode_step(model, image.IMAGE_KIND, state)
        seen.append(logits)
        chosen.append(choose(step, logits))
    return np.stack(seen), np.stack(chosen, axis=1)


def test_prompt_rows_are_those_of_the_original(pipeline, requests, recorded):
    length = len(recorded["prompt_ids"])
    np.testing.assert_array_equal(requests.lengths, [length] * 2)
    np.testing.assert_array_equal(requests.tokens[0, 0, :length], recorded["prompt_ids"])
    embeds = pipeline.model.language_model.embed(requests.tokens[..., :length])
    expected = recorded["first_inputs_embeds"].reshape(embeds.shape)
    np.testing.assert_allclose(embeds, expected, atol=1e-6)


def test_greedy_tokens_and_pixels_are_those_of_the_original(pipeline, requests, recorded):
    indices, pixels = next(image.generate(pipeline.model, requests))
    np.testing.assert_array_equal(indices, recorded["greedy_tokens"])
    difference = np.abs(pixels.astype(int) - recorded["greedy_uint8"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_logits_under_forced_tokens_are_those_of_the_original(pipeline, requests, recorded):
    logits, _ = _walk(pipeline, requests, lambda step, _: recorded["forced_tokens"][:, step])
    np.testing.assert_allclose(logits, recorded["forced_cfg_logits"], atol=1e-4, rtol=1e-4)
    pixels = pipeline.decode_indices(recorded["forced_tokens"])
    assert np.abs(pixels.astype(int) - recorded["forced_uint8"]).max() <= 1


def test_sampling_with_the_recorded_noise_gives_the_recorded_tokens(pipeline, requests, recorded):
    sampling = samplers.make_sampling(float(recorded["gumbel_temperature"]), None, None, 128)
    noise = recorded["gumbel"]
    _, indices = _walk(
        pipeline,
        requests,
        lambda step, logits: samplers.sample_token(logits, noise[step], sampling),
    )
    np.testing.assert_array_equal(indices, recorded["gumbel_tokens"])


@pytest.fixture(scope="module")
def five(small):
    """Five sampled images of the recorded prompt, generated in one batch."""
    return small.generate_images(PROMPT, num_images=5, seed=3)


def test_images_of_one_prompt_differ_and_repeat(small, five):
    assert len({row.tobytes() for row in five.indices}) == 5
    other = small.generate_images(PROMPT, num_images=5, seed=4)
    assert (other.indices != five.indices).mean() > 0.5
    again = small.generate_images(PROMPT, num_images=5, seed=3)
    np.testing.assert_array_equal(again.pixels, five.pixels)


def num_programs() -> int:
    """Returns the number of programs that were compiled so far to generate images."""
    programs = image.begin_batch, image.advance_batch, codec.decode_program("cpu")
    return sum(program._cache_size() for program in programs)


def test_chunks_change_nothing_and_share_one_program(small, five):
    small.generate_images(PROMPT, num_images=2)
    before = num_programs()
    chunked = small.generate_images(PROMPT, num_images=5, seed=3, max_batch=2)
    assert num_programs() == before  # 2 + 2 + 1 images
    np.testing.assert_array_equal(chunked.indices, five.indices)
    np.testing.assert_array_equal(chunked.pixels, five.pixels)


def test_a_prompt_gives_in_a_batch_what_it_gives_alone(small, five):
    batch = small.generate_images([OTHER, PROMPT], num_images=2, seed=3, max_batch=2)
    np.testing.assert_array_equal(batch.indices[2:], five.indices[:2])
    # the short prompt alone is padded to a shorter bucket
    alone = small.generate_images(OTHER, num_images=1, seed=3)
    np.testing.assert_array_equal(batch.indices[:1], alone.indices)
    np.testing.assert_array_equal(batch.pixels[:1], alone.pixels)


def test_another_batch_moves_logits_by_no_more_than_rounding(small):
    """The bound that docs/sampling.md states; it also holds with more padding."""
    alone = _requests(small, [OTHER], 1)

    def greedy(step, logits):
        return np.argmax(logits, axis=-1).astype(np.int32)

    expected = _walk(small, alone, greedy)[0][:, 0]
    for prompts, number, place in (([OTHER], 3, 2), ([PROMPT, OTHER], 1, 1)):
        found = _walk(small, _requests(small, prompts, number), greedy)[0][:, place]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_new_prompt_or_setting_compiles_nothing(small, five):
    before = num_programs()
    changes = [
        {"guidance_weight": 2.5},
        {"temperature": 0.3},
        {"seed": 9},
        {"temperature": 0},
    ]
    for i, change in enumerate(changes):
        prompt = f"{'a very ' * i}long sentence on some blue and round thing"
        small.generate_images(prompt, num_images=5, **change)
    assert num_programs() == before
    small.generate_images(PROMPT, num_images=5, top_k=3, top_p=0.5)
    small.generate_images(PROMPT, num_images=5, top_k=128, top_p=0.1)
    assert num_programs() == before + 2  # the prompt and the loop


def test_top_k_1_is_greedy(pipeline, recorded):
    generated = pipeline.generate_images(PROMPT, num_images=2, top_k=1, top_p=0.5)
    np.testing.assert_array_equal(generated.indices, recorded["greedy_tokens"])


def test_guidance_weight_1_needs_no_rows_without_words(small):
    without = _requests(small, [PROMPT], 2, guidance_weight=1.0, temperature=1.0)
    assert without.tokens.shape[1] == 1
    guided = _requests(small, [PROMPT], 2, guidance_weight=2.0, temperature=1.0)
    choice = dataclasses.replace(guided.choice, guidance_weight=np.ones(2, np.float32))
    guided = dataclasses.replace(guided, choice=choice)
    np.testing.assert_array_equal(
        *(next(image.generate(small.model, batch))[0] for batch in (without, guided))
    )


def test_the_cache_is_freed_before_the_images_are_decoded(small, requests, monkeypatch):
    decoder = small.model.cfg.language_model
    heads = decoder.num_key_value_heads, decoder.head_dim

    def num_caches() -> int:
        return sum(x.shape[-2:] == heads and x.ndim > 3 for x in jax.live_arrays())

    def decode(*arguments):
        found.append(num_caches())
        return decode_batch(*arguments)

    found, before, decode_batch = [], num_caches(), codec.decode_batch
    monkeypatch.setattr(codec, "decode_batch", decode)
    image.generate_batch(small.model, requests)
    assert found == [before]


def test_the_text_head_takes_no_part(small, requests):
    headless = nnx.clone(small.model)
    del headless.language_model.lm_head
    whole, without = (
        image.generate_batch(model, requests).indices for model in (small.model, headless)
    )
    np.testing.assert_array_equal(whole, without)


def test_progress_reaches_the_end_and_changes_nothing(small, five):
    seen = []
    generated = small.generate_images(
        PROMPT, 5, seed=3, max_batch=2, progress=lambda *report: seen.append(report)
    )
    np.testing.assert_array_equal(generated.indices, five.indices)
    np.testing.assert_array_equal(generated.pixels, five.pixels)
    done, total = zip(*seen, strict=True)
    assert set(total) == {5 * 16}
    assert done[0] == 0 and done[-1] == 5 * 16 and list(done) == sorted(done)
    assert len(set(done)) > 16  # more than once a chunk


def test_bfloat16_generates_with_a_float32_image_tokenizer(golden):
    from janus_jax import load

    pipeline = load(golden / "janus_small", dtype="bfloat16")
    model = pipeline.model
    assert model.language_model.layers[0].mlp.up_proj.kernel[...].dtype == jnp.bfloat16
    assert model.gen_vq.codebook[...].dtype == jnp.float32
    requests, number = _requests(pipeline, [PROMPT], 1), model.cfg.num_image_tokens
    _, logits = _prefill(model, image.IMAGE_KIND, requests, number)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    generated = pipeline.generate_images(PROMPT, num_images=1)
    assert generated.pixels.shape == (1, 64, 64, 3) and generated.pixels.dtype == np.uint8
    assert len(np.unique(generated.indices)) > 1
    np.testing.assert_array_equal(pipeline.decode_indices(generated.indices), generated.pixels)


@pytest.mark.parametrize(
    ("total", "most", "shards", "size"),
    [
        *[(5, 2, 1, 2), (10, 8, 1, 5), (1, 16, 1, 1), (1, 16, 8, 8)],
        *[(9, 4, 2, 4), (16, 16, 8, 16), (6, 3, 2, 2), (10, 7, 4, 4)],
    ],
)
def test_chunks_are_even_and_full_multiples_of_the_shards(total, most, shards, size):
    assert chunks.chunk_size(total, most, shards) == size
    numbers, kept = zip(*chunks.padded_chunks(total, size), strict=True)
    assert {len(chunk) for chunk in numbers} == {size} and sum(kept) == total
    found = np.concatenate([chunk[:n] for chunk, n in zip(numbers, kept, strict=True)])
    np.testing.assert_array_equal(found, np.arange(total))
    assert max(map(max, numbers)) == total - 1


def test_the_memory_bound_is_that_of_the_cache(small):
    decoder = small.model.cfg.language_model
    number = chunks.default_max_batch(decoder, 2 * (64 + 15), None)
    caches = jax.eval_shape(lambda: empty_cache(decoder, 2 * number, 64 + 15))
    taken = sum(x.size * x.dtype.itemsize for x in (*caches.keys, *caches.values))
    assert 0.99 * chunks.CACHE_BYTES < taken <= chunks.CACHE_BYTES
