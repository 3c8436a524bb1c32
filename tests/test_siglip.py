"""SigLIP against `transformers` (random weights) and against recordings of the original."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import (
    assert_close,
    call,
    channels_first,
    channels_last,
    golden_janus,
    rebuilt,
    tiny_pair,
    uniform,
)

from janus_jax.models.siglip import Siglip, SiglipConfig


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "janus_vision.npz")


@pytest.fixture(scope="module")
def pixels():
    return uniform(2, 16, 16, 3)


def test_embedding_equals_torch(pixels):
    theirs, ours = tiny_pair()
    expected = theirs.model.vision_model.embeddings(channels_first(pixels))
    got = jax.jit(Siglip.embed)(ours.und_encoder, pixels)
    assert_close("SigLIP embedding", got, expected, 1e-5)


def test_attention_mlp_and_block_equal_torch():
    theirs, ours = tiny_pair()
    layer, block = theirs.model.vision_model.encoder.layers[0], ours.und_encoder.blocks[0]
    x = uniform(2, 16, 24)
    attended = layer.self_attn(torch.tensor(x))[0]
    assert_close("SigLIP attention", call(block.attn, x), attended, 1e-5)
    assert_close("SigLIP MLP", call(block.mlp, x), layer.mlp(torch.tensor(x)), 1e-5)
    assert_close("SigLIP block", call(block, x), layer(torch.tensor(x), None), 1e-5)


def test_stack_equals_torch(pixels):
    theirs, ours = tiny_pair()
    expected = theirs.model.vision_model(channels_first(pixels)).last_hidden_state
    assert_close("SigLIP stack", call(ours.und_encoder, pixels), expected, 1e-4)


def test_embedding_and_blocks_equal_the_recording(recording):
    siglip = golden_janus().und_encoder
    x = jax.jit(Siglip.embed)(siglip, channels_last(recording["pixel_values"]))
    assert_close("SigLIP golden embedding", x, recording["after_embed"], 1e-5)
    for i, block in enumerate(siglip.blocks):
        x = call(block, x)
        assert_close(f"SigLIP golden block {i}", x, recording["block_outputs"][i], 1e-5)


def test_features_equal_the_recording(recording):
    features = call(golden_janus().und_encoder, channels_last(recording["pixel_values"]))
    assert_close("SigLIP golden features", features, recording["features"], 1e-4)


def test_select_layer_leaves_out_the_last_block_but_not_the_norm(recording):
    siglip = golden_janus().und_encoder
    shorter = rebuilt(siglip, dataclasses.replace(siglip.cfg, select_layer=-2))
    features = call(shorter, channels_last(recording["pixel_values"]))
    expected = recording["features_select_layer_minus2"]
    assert_close("SigLIP golden features, select_layer=-2", features, expected, 1e-4)


def test_tokens_are_row_major(pixels):
    """A change in the top right patch changes the embedding of token 3 of 16, and no other."""
    siglip = tiny_pair()[1].und_encoder
    changed = pixels.copy()
    changed[:, :4, 12:] += 1
    embed = jax.jit(Siglip.embed)
    difference = np.abs(embed(siglip, changed) - embed(siglip, pixels))
    np.testing.assert_array_equal(np.flatnonzero(difference.max(axis=(0, 2)) > 1e-3), [3])


def test_bfloat16_is_near_float32(pixels):
    """Within 5 % of the largest feature: a few roundings of 2**-8 in each block."""
    exact = tiny_pair()[1].und_encoder
    cfg = dataclasses.replace(exact.cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    features, expected = call(rebuilt(exact, cfg), pixels), call(exact, pixels)
    assert features.dtype == jnp.bfloat16
    limit = 0.05 * np.abs(expected).max()
    assert_close("SigLIP, bfloat16", features.astype(jnp.float32), expected, limit)


def test_released_size():
    cfg = SiglipConfig.siglip_large_patch16_384()
    assert (cfg.num_tokens, cfg.width, cfg.num_layers, cfg.mlp_dim) == (576, 1024, 24, 4096)
