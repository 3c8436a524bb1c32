"""Taking the positions of a mask and putting them back: against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.models.masked import put_masked, take_masked

MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


def taken(x, mask, size):
    out = np.zeros((len(x), size, *x.shape[2:]), x.dtype)
    for row, values, keep in zip(out, x, mask, strict=True):
        row[: keep.sum()] = values[keep]
    return out


def put(values, mask):
    out = np.zeros((*mask.shape, *values.shape[2:]), values.dtype)
    for row, given, keep in zip(out, values, mask, strict=True):
        row[keep] = given[: keep.sum()]
    return out


@pytest.mark.parametrize("shape, dtype", [((), np.int32), ((), bool), ((2, 3), np.float32)])
@pytest.mark.parametrize("size", [5, 8])
def test_values_are_moved_in_order(shape, dtype, size):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (3, 5, *shape)).astype(dtype)
    values = rng.integers(1, 9, (3, size, *shape)).astype(dtype)
    front, back = take_masked(x, MASK, size), put_masked(values, MASK)
    np.testing.assert_array_equal(front, taken(x, MASK, size))
    np.testing.assert_array_equal(back, put(values, MASK))
    assert front.dtype == back.dtype == dtype


def test_each_is_the_gradient_of_the_other():
    rng = np.random.default_rng(1)
    x, values = rng.random((3, 5, 2), np.float32), rng.random((3, 6, 2), np.float32)
    _, pull_back = jax.vjp(lambda x: take_masked(x, MASK, 6), x)
    np.testing.assert_array_equal(pull_back(jnp.asarray(values))[0], put(values, MASK))
    _, pull_back = jax.vjp(lambda values: put_masked(values, MASK), values)
    np.testing.assert_array_equal(pull_back(jnp.asarray(x))[0], taken(x, MASK, 6))


def test_neither_function_nor_its_gradient_sorts_or_scatters():
    x = np.zeros((3, 5, 2), np.float32)
    losses = (
        lambda x: jnp.sum(take_masked(x, MASK, 6)),
        lambda x: jnp.sum(put_masked(x, MASK)),
    )
    for loss in losses:
        text = str(jax.make_jaxpr(jax.grad(loss))(x))
        assert "gather" in text and "scatter" not in text and "sort[" not in text
