"""The decoder, compared with transformers (random weights, grouped heads), with recordings of the
original code, and with itself: cache, causality, padding and packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny_janus import empty_cache
from torch_reference import (
    assert_close,
    call,
    counting,
    golden_janus,
    rebuilt,
    tiny_pair,
    uniform,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from janus_jax.models.layers import flat_matmul
from janus_jax.models.llama import Llama, apply_rope, rope_angles

pytestmark = pytest.mark.usefixtures("quick_compiles")

logits_of = jax.jit(lambda model, hidden: model.lm_head(hidden))


@jax.jit
def run_tokens(model: Llama, tokens, positions=None, segment_ids=None):
    """Logits of a whole sequence, float32[B, T, V]."""
    hidden, _ = model(model.embed(tokens), positions=positions, segment_ids=segment_ids)
    return model.lm_head(hidden)


@jax.jit
def run(model: Llama, embeds, **options):
    """Hidden states and cache."""
    return model(embeds, **options)


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "janus_llm.npz")


@pytest.fixture(scope="module")
def prompt(golden):
    """The recorded left-padded batch: embeddings float32[3, 74, 48] and token_mask bool[3, 74]."""
    embeds = np.load(golden / "janus_embeds.npz")["inputs_embeds"]
    return embeds, np.load(golden / "janus_processor.npz")["attention_mask"].astype(bool)


@pytest.fixture(scope="module")
def pair():
    theirs, ours = tiny_pair()
    return theirs, ours.language_model


def tokens_of(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 95, (batch, length)).astype(np.int32)


# --- against torch ---


def test_rope_equals_torch_to_the_last_trained_position():
    """Released sizes. The last float32 bit of a frequency, 3e-8, turns position 4095 by 1.2e-4."""
    config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=16, rope_theta=1e4)
    rotary = LlamaRotaryEmbedding(config)
    for first, atol in ((0, 1e-5), (4080, 2e-4)):
        positions, q = first + np.array(counting(1, 16)), uniform(1, 16, 2, 128)
        heads_first = torch.tensor(q).transpose(1, 2)
        cos, sin = rotary(heads_first, torch.tensor(positions))
        expected, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
        got = apply_rope(q, *rope_angles(positions, 128, 10000.0))
        assert_close(f"RoPE from position {first}", got, expected.transpose(1, 2), atol)


def test_norm_mlp_and_block_equal_torch(pair):
    """Four query heads share two key heads."""
    theirs, ours = pair
    model, x = theirs.model.language_model, uniform(2, 7, 32)
    layer, block = model.layers[0], ours.layers[0]
    small = 1e-3 * x  # of the size where epsilon counts
    expected = layer.input_layernorm(torch.tensor(small))
    assert_close("Llama RMSNorm", call(block.input_layernorm, small), expected, 1e-5)
    assert_close("Llama MLP", call(block.mlp, x), layer.mlp(torch.tensor(x)), 1e-5)
    positions = np.array(counting(2, 7))
    cos_sin = model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    mask = torch.full((2, 1, 7, 7), -1e30).triu(1)
    expected = layer(torch.tensor(x), attention_mask=mask, position_embeddings=cos_sin)
    angles = rope_angles(positions, ours.cfg.head_dim, ours.cfg.rope_theta)
    got, keys, _ = call(block, x, angles)
    assert keys.shape == (2, 7, 2, 8)
    assert_close("Llama block", got, expected, 1e-5)


def test_logits_equal_torch(pair):
    theirs, ours = pair
    tokens = tokens_of(2, 12)
    expected = theirs(torch.tensor(tokens)).logits
    got = run_tokens(ours, tokens)
    assert_close("Llama stack, logits", got, expected, 1e-4)


def test_left_padded_batch_equals_torch(pair):
    theirs, ours = pair
    tokens = tokens_of(2, 12)
    token_mask = np.arange(12) >= np.array([[5], [0]])
    positions = np.maximum(np.arange(12) - np.array([[5], [0]]), 0)
    expected = theirs(
        torch.tensor(tokens),
        attention_mask=torch.tensor(token_mask),
        position_ids=torch.tensor(positions),
    ).logits
    got = run_tokens(ours, tokens, positions, token_mask.astype(np.int32))
    got, expected = np.asarray(got)[token_mask], expected.numpy()[token_mask]
    assert_close("Llama stack, left-padded", got, expected, 1e-4)


# --- against the recordings ---


def test_every_layer_equals_the_recording(recording):
    """The recording has the embeddings, all layers' outputs but the last, and the final norm's."""
    llama, expected = golden_janus().language_model, recording["plain_hidden_states"]
    tokens = recording["plain_input_ids"]
    angles = rope_angles(counting(2, 12), llama.cfg.head_dim, llama.cfg.rope_theta)
    x = jax.jit(Llama.embed)(llama, tokens)
    assert_close("Llama golden embedding", x, expected[0], 0)
    for i, layer in enumerate(llama.layers):
        x, _, _ = call(layer, x, angles)
        if i + 1 < len(llama.layers):
            assert_close(f"Llama golden layer {i}", x, expected[i + 1], 1e-5)
    assert_close("Llama golden norm", call(llama.norm, x), expected[-1], 1e-5)
    logits = run_tokens(llama, tokens)
    assert_close("Llama golden logits", logits, recording["plain_logits"], 1e-4)


def test_rope_theta_and_epsilon_come_from_the_config(recording):
    llama = golden_janus("config_variant.json").language_model
    assert (llama.cfg.rope_theta, llama.cfg.rms_norm_eps) == (50000.0, 1e-6)
    logits = run_tokens(llama, recording["plain_input_ids"])
    assert_close("Llama golden variant logits", logits, recording["variant_logits"], 1e-4)
    assert np.abs(logits - recording["plain_logits"]).max() > 1e-2


def test_left_padded_images_and_text_equal_the_recording(recording, prompt):
    """As in the forward pass of the original code, positions are 0..T-1 also with padding."""
    llama, (embeds, token_mask) = golden_janus().language_model, prompt
    hidden, _ = run(llama, embeds, segment_ids=token_mask.astype(np.int32))
    expected = recording["mm_last_hidden_state"][token_mask]
    assert_close("Llama golden padded", np.asarray(hidden)[token_mask], expected, 1e-4)
    logits = logits_of(llama, hidden[:, -8:])
    assert_close("Llama golden padded logits", logits, recording["mm_logits_last8"], 1e-4)


def test_greedy_tokens_equal_the_recording(recording, prompt):
    """Prefill, then one position at a time, as `generate` of the original code does.

    The recorded prompts are padded on the left; here the padding is on the right.
    """
    llama, (embeds, token_mask) = golden_janus().language_model, prompt
    lengths, steps = token_mask.sum(1), 12
    rows = [np.roll(row, length, axis=0) for row, length in zip(embeds, lengths, strict=True)]
    hidden, cache = run(llama, np.stack(rows))
    last = hidden[np.arange(len(rows)), lengths - 1]
    cache = cache.resized(cache.size + steps, jnp.asarray(lengths, jnp.int32))
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(logits_of(llama, last))
        tokens.append(logits[-1].argmax(-1))
        hidden, cache = run(llama, llama.embed(tokens[-1][:, None]), cache=cache)
        last = hidden[:, 0]
    np.testing.assert_array_equal(np.stack(tokens, 1), recording["greedy_tokens"])
    assert_close("Llama golden greedy", np.stack(logits), recording["greedy_logits"], 1e-4)


# --- against itself ---


def test_prefill_and_decode_equal_the_full_forward(pair):
    """5 positions in one call, then 2, then one at a time; one slot of the cache stays unused."""
    _, llama = pair
    embeds = jax.jit(Llama.embed)(llama, tokens_of(2, 9))
    full, whole = run(llama, embeds)
    cache, parts = empty_cache(llama.cfg, 2, 10), []
    for start, end in ((0, 5), (5, 7), (7, 8), (8, 9)):
        hidden, cache = run(llama, embeds[:, start:end], cache=cache)
        np.testing.assert_array_equal(cache.lengths, [end, end])
        parts.append(hidden)
    assert (cache.size, whole.size) == (10, 9)
    assert_close("prefill + decode", np.concatenate(parts, 1), full, 1e-5)
    assert_close("keys", cache.keys[1][:, :9], whole.keys[1], 1e-5)
    assert not np.asarray(cache.keys[0])[:, 9].any()


def test_rows_of_unequal_lengths_decode_together(pair):
    """Rows of 3 and 6 tokens, then three more each; what lay behind a row's length is not read."""
    _, llama = pair
    embeds, lengths = jax.jit(Llama.embed)(llama, tokens_of(2, 9)), np.array([3, 6], np.int32)
    full, _ = run(llama, embeds)
    _, cache = run(llama, embeds[:, :6])
    cache = cache.resized(9, jnp.asarray(lengths))
    for step in range(3):
        place = lengths + step
        hidden, cache = run(llama, embeds[np.arange(2), place][:, None], cache=cache)
        np.testing.assert_array_equal(cache.lengths, place + 1)
        assert_close("decode", hidden[:, 0], full[np.arange(2), place], 1e-5)


def test_a_full_row_of_the_cache_does_not_change(pair):
    _, llama = pair
    _, cache = run(llama, uniform(2, 4, 32))
    _, after = run(llama, uniform(2, 1, 32), cache=cache.resized(4, jnp.array([4, 2])))
    np.testing.assert_array_equal(after.keys[0][0], cache.keys[0][0])
    np.testing.assert_array_equal(after.keys[0][1, :2], cache.keys[0][1, :2])
    assert (np.asarray(after.keys[0])[1, 2] != np.asarray(cache.keys[0])[1, 2]).any()


def test_no_position_sees_a_later_one(pair):
    """The gradient of the output at position 4 is nonzero at 0..4 and exactly zero after it."""
    _, llama = pair
    embeds = uniform(1, 8, 32)

    def output(x):
        return llama(x)[0][0, 4].sum()

    gradient = np.abs(jax.jit(jax.grad(output))(embeds)).max(axis=(0, 2))
    assert (gradient[:5] > 0).all()
    np.testing.assert_array_equal(gradient[5:], 0)


def test_padded_rows_equal_the_rows_alone(pair):
    """Rows of 4 and 12 tokens; the values at padding positions have no effect."""
    _, llama = pair
    tokens = tokens_of(2, 12)
    batch = run_tokens(llama, tokens)
    for row, length in enumerate((4, 12)):
        expected = run_tokens(llama, tokens[row : row + 1, :length])
        assert_close(f"row of {length} padded", batch[row : row + 1, :length], expected, 1e-5)


def test_packed_examples_equal_the_examples_alone(pair):
    """One row has two examples and padding; positions restart in each example."""
    _, llama = pair
    tokens = tokens_of(1, 9)
    segment_ids = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0]])
    packed = run_tokens(llama, tokens, positions, segment_ids)
    for start, end in ((0, 5), (5, 8)):
        expected = run_tokens(llama, tokens[:, start:end])
        assert_close(f"packed {start}:{end}", packed[:, start:end], expected, 1e-5)


def test_grouped_heads_equal_repeated_key_heads(pair):
    """A model without grouping, whose key heads are repeated twice, gives the same logits."""
    _, grouped = pair
    cfg = dataclasses.replace(grouped.cfg, num_key_value_heads=4)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0))))
    flat = []
    for path, kernel in nnx.to_flat_state(nnx.state(grouped)):
        if "k_proj" in path or "v_proj" in path:
            heads = kernel[...].reshape(32, 2, 8)
            kernel = kernel.replace(jnp.repeat(heads, 2, axis=1).reshape(32, 32))
        flat.append((path, kernel))
    full = nnx.merge(graph, nnx.from_flat_state(flat))
    x = uniform(2, 6, 32)
    assert_close("grouped heads", run(full, x)[0], run(grouped, x)[0], 1e-5)


def test_bfloat16_is_near_float32(pair):
    """Within 5 % of the largest logit: a few roundings of 2**-8 in each block."""
    _, exact = pair
    cfg = dataclasses.replace(exact.cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    rough = rebuilt(exact, cfg)
    tokens = tokens_of(2, 12)
    logits, expected = run_tokens(rough, tokens), run_tokens(exact, tokens)
    assert logits.dtype == jnp.float32
    limit = 0.05 * np.abs(expected).max()
    assert_close("Llama bfloat16 logits", logits, expected, limit)
    assert rough(rough.embed(tokens))[1].keys[0].dtype == jnp.bfloat16
    assert rough.embed(tokens).dtype == jnp.bfloat16


def test_logits_of_bfloat16_are_not_rounded_to_bfloat16(pair):
    _, exact = pair
    cfg = dataclasses.replace(exact.cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    rough, hidden = rebuilt(exact, cfg), jnp.asarray(uniform(2, 3, 32), jnp.bfloat16)
    kernel = rough.lm_head.kernel[...].astype(jnp.float32)
    expected = jnp.matmul(hidden.astype(jnp.float32), kernel)
    assert_close("Llama bfloat16 head", logits_of(rough, hidden), expected, 1e-5)


def test_far_positions_stay_apart_in_bfloat16():
    """In bfloat16, positions 256 and 257 are equal; their angles must differ."""
    cos, _ = rope_angles(jnp.array([[256, 257]]), 8, 10000.0)
    assert cos.dtype == jnp.float32
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = apply_rope(x, *rope_angles(jnp.array([[256, 257]]), 8, 10000.0))
    assert turned.dtype == jnp.bfloat16
    assert np.abs(turned[0, 0] - turned[0, 1]).max() > 0.1


def test_a_single_row_is_multiplied_twice_in_bfloat16():
    """So that XLA compiles a product of matrices; the result is that of a larger product."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 64), (64, 32)))
    one, two = flat_matmul(x[:1], kernel), flat_matmul(x, kernel)
    assert one.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one[0], two[0])
    text = jax.jit(flat_matmul).lower(x[:1], kernel).as_text()
    assert "(tensor<2x64xbf16>, tensor<64x32xbf16>)" in text
    text = jax.jit(flat_matmul).lower(*(a.astype(jnp.float32) for a in (x[:1], kernel))).as_text()
    assert "(tensor<1x64xf32>, tensor<64x32xf32>)" in text
