"""Attention against torch, and masks and positions against literal arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import assert_close, uniform

from janus_jax.models.attention import attention, attention_mask


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
    """Queries of two rows at different positions, and queries that attend to all keys."""
    q, k, v = qkv(key_heads)
    start = np.array([2, 0], np.int32)
    place = start[:, None, None] + np.arange(3)[None, :, None]
    causal = dict(causal=True, q_start=start)
    for name, mask, arguments in (("causal", np.arange(5) <= place, causal), ("open", None, {})):
        ours = jax.jit(attention, static_argnames="causal")(q, k, v, **arguments)
        expected = torch_attention(q, k, v, mask)
        assert_close(f"attention, {name}, {key_heads} key heads", ours, expected, 1e-5)


def test_bfloat16_inputs_get_a_float32_softmax():
    """Only the weights and the output may be rounded, by 2**-8 each.

    In bfloat16, logits up to 30 would be off by 0.1, and the weights by a tenth.
    """
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(2))
    ours = jax.jit(attention)(4 * q, k, v)
    exact = jax.jit(attention)(*(x.astype(jnp.float32) for x in (4 * q, k, v)))
    assert ours.dtype == jnp.bfloat16
    assert_close("attention, bfloat16", ours.astype(jnp.float32), exact, atol=0.02, rtol=2**-8)


def test_mask_of_a_prefill():
    expected = np.tril(np.ones((1, 4, 4), bool))
    np.testing.assert_array_equal(attention_mask(4, 4, True, None, None), expected)
    assert attention_mask(4, 4, False, None, None) is None


def test_mask_of_packed_rows():
    segment_ids = jnp.array([[1, 1, 2, 0, 0], [3, 3, 3, 1, 1]])
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    second = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    mask = attention_mask(5, 5, True, None, segment_ids)
    np.testing.assert_array_equal(mask, np.array([first, second], bool))
    both_ways = attention_mask(5, 5, False, None, segment_ids)
    np.testing.assert_array_equal(both_ways, mask | np.swapaxes(mask, 1, 2))


def test_mask_of_a_decode_step_has_the_length_of_each_row():
    mask = attention_mask(1, 4, True, jnp.array([2, 0]), None)
    np.testing.assert_array_equal(mask, np.array([[[1, 1, 1, 0]], [[1, 0, 0, 0]]], bool))


def test_mask_of_later_positions_continues_the_mask_of_the_whole():
    whole = attention_mask(6, 6, True, None, None)
    part = attention_mask(2, 6, True, jnp.array([3, 1]), None)
    np.testing.assert_array_equal(part, np.stack([whole[0, 3:5], whole[0, 1:3]]))


def test_padding_gives_finite_outputs_and_gradients():
    q, _, _ = qkv(4)
    segment_ids = jnp.array([[1, 0, 0], [0, 0, 0]])

    def total(x):
        return attention(x, x, x, causal=True, segment_ids=segment_ids).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(q)).all()
