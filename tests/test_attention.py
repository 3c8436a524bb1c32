"""Attention against torch, and masks and positions against literal arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import assert_close, uniform

from janus_jax.models.attention import (
    attention,
    causal_mask,
    decode_mask,
    positions_from_mask,
    segment_mask,
)


def qkv(key_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns q with 3 positions and 4 heads, k and v with 5 positions; values up to 3."""
    q = 3 * uniform(2, 3, 4, 8, seed=1)
    k, v = (3 * uniform(2, 5, key_heads, 8, seed=seed) for seed in (2, 3))
    return q, k, v


def torch_attention(q, k, v, mask) -> torch.Tensor:
    """float[B, T, N, H], with torch's own grouping of heads."""
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else torch.tensor(mask)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_equals_torch_with_grouped_heads(key_heads):
    q, k, v = qkv(key_heads)
    mask = np.random.default_rng(4).random((2, 3, 5)) < 0.5
    mask[..., 0] = True
    for name, m in (("attention, masked", mask), ("attention, open", None)):
        ours = jax.jit(attention)(q, k, v, m)
        assert_close(f"{name}, {key_heads} key heads", ours, torch_attention(q, k, v, m), 1e-5)


def test_bfloat16_inputs_get_a_float32_softmax():
    """Only the weights and the output may be rounded, by 2**-8 each.

    In bfloat16, logits up to 30 would be off by 0.1, and the weights by a tenth.
    """
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(2))
    ours = jax.jit(attention)(4 * q, k, v, None)
    exact = jax.jit(attention)(*(x.astype(jnp.float32) for x in (4 * q, k, v)), None)
    assert ours.dtype == jnp.bfloat16
    assert_close("attention, bfloat16", ours.astype(jnp.float32), exact, atol=0.02, rtol=2**-8)


def test_causal_mask_rows():
    token_mask = jnp.array([[0, 1, 1], [1, 1, 1]], bool)
    expected = [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
    ]
    np.testing.assert_array_equal(causal_mask(token_mask, 4), np.array(expected, bool))
    np.testing.assert_array_equal(causal_mask(token_mask), np.array(expected, bool)[..., :3])


def test_segment_mask_rows():
    mask = segment_mask(jnp.array([[1, 1, 2, 0, 0], [3, 3, 3, 1, 1]]))
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    second = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(mask, np.array([first, second], bool))


def test_decode_mask_rows():
    token_mask = jnp.array([[0, 1, 1], [1, 1, 1]], bool)
    first = decode_mask(token_mask, jnp.int32(3), 6)
    np.testing.assert_array_equal(first, np.array([[[0, 1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0, 0]]]))
    second = decode_mask(token_mask, jnp.int32(4), 6)
    np.testing.assert_array_equal(second, np.array([[[0, 1, 1, 1, 1, 0]], [[1, 1, 1, 1, 1, 0]]]))


def test_decode_mask_continues_causal_mask():
    """The mask of a decode step equals that row of the causal mask of the whole sequence."""
    prompt = jnp.array([[0, 0, 1, 1]], bool)
    whole = causal_mask(jnp.array([[0, 0, 1, 1, 1, 1]], bool), 7)
    for length in (4, 5):
        step = decode_mask(prompt, jnp.int32(length), 7)
        np.testing.assert_array_equal(step[:, 0], whole[:, length])


def test_positions_start_at_the_first_real_token():
    token_mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    positions = positions_from_mask(token_mask)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_padding_gives_finite_outputs_and_gradients():
    q, _, _ = qkv(4)
    mask = causal_mask(jnp.array([[0, 0, 1], [0, 0, 0]], bool))
    loss = jax.jit(jax.grad(lambda x: attention(x, x, x, mask).sum()))
    assert np.isfinite(loss(q)).all()
