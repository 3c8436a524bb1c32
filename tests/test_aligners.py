"""Aligners, image-token embeddings and image head, compared with torch and the recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_reference import assert_close, call, golden_janus, rebuilt, tiny_pair, uniform

from janus_jax.models.janus import Aligner, Janus
from janus_jax.models.layers import gelu

embed_image_tokens = jax.jit(Janus.embed_image_tokens)


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "janus_embeds.npz")


def test_aligners_equal_torch():
    theirs, ours = tiny_pair()
    pairs = {
        "und_aligner": (theirs.model.aligner, ours.und_aligner, 24),
        "gen_aligner": (theirs.model.generation_aligner, ours.gen_aligner, 8),
    }
    for name, (torch_aligner, aligner, width) in pairs.items():
        x = 2 * uniform(3, 5, width)
        assert_close(name, call(aligner, x), torch_aligner(torch.tensor(x)), 1e-5)


def test_generation_embedding_equals_torch():
    theirs, ours = tiny_pair()
    indices = np.random.default_rng(1).integers(0, 40, (3, 5))
    expected = theirs.prepare_embeddings_for_image_generation(torch.tensor(indices))
    assert_close("gen_embed + gen_aligner", embed_image_tokens(ours, indices), expected, 1e-5)


def test_image_head_equals_torch():
    theirs, ours = tiny_pair()
    x = 2 * uniform(3, 5, 32)
    expected = theirs.model.generation_head(torch.tensor(x))
    assert_close("gen_head", call(ours.gen_head, x), expected, 1e-5)


def test_und_aligner_equals_the_recording(golden):
    recording = np.load(golden / "janus_vision.npz")
    aligned = call(golden_janus().und_aligner, recording["features"])
    assert_close("und_aligner, golden", aligned, recording["aligned"], 1e-5)


def test_generation_embedding_equals_the_recording(recording):
    embeds = embed_image_tokens(golden_janus(), recording["gen_ids"])
    assert_close("gen_embed + gen_aligner, golden", embeds, recording["gen_img_embeds"], 1e-5)


def test_image_head_equals_the_recording(recording):
    logits = call(golden_janus().gen_head, recording["gen_head_in"])
    assert_close("gen_head, golden", logits, recording["gen_head_out"], 1e-5)


def test_depth_one_is_linear():
    aligner = Aligner(4, 6, 1, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, layer = uniform(3, 4), aligner.layers[0]
    assert len(aligner.layers) == 1
    expected = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    assert_close("aligner of depth 1", call(aligner, x), expected, 1e-6)


def test_bfloat16_is_near_float32():
    """bfloat16 keeps 8 bits: 2 % of the largest number over two layers."""
    exact = tiny_pair()[1]
    rough = rebuilt(exact, exact.cfg.with_dtype(jnp.bfloat16))
    x = uniform(3, 5, 32)
    logits, expected = call(rough.gen_head, x), call(exact.gen_head, x)
    assert_close("gen_head, bfloat16", logits, expected, 0.02 * np.abs(expected).max())
    features = uniform(3, 5, 24)
    aligned, expected = call(rough.und_aligner, features), call(exact.und_aligner, features)
    assert aligned.dtype == jnp.bfloat16
    limit = 0.02 * np.abs(expected).max()
    assert_close("und_aligner, bfloat16", aligned.astype(jnp.float32), expected, limit)


def test_logits_of_bfloat16_are_not_rounded_to_bfloat16():
    """Without jit, which would keep more digits of the hidden layer than this formula does."""
    exact = tiny_pair()[1]
    head = rebuilt(exact, exact.cfg.with_dtype(jnp.bfloat16)).gen_head
    x = uniform(3, 5, 32)
    inner = gelu(head.proj(x)).astype(jnp.float32)
    kernel, bias = (w[...].astype(jnp.float32) for w in (head.out.kernel, head.out.bias))
    expected = jnp.matmul(inner, kernel) + bias[None, None]
    assert_close("gen_head, bfloat16 logits", head(x), expected, 1e-5)
