"""Sampling: compared with NumPy, by frequencies, and what must not change the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import checks
from janus_jax.generation import samplers

SIZE = 12


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 2, (3, SIZE)).astype(np.float32)


def _sampling(temperature=1.0, top_k=None, top_p=None):
    return samplers.make_sampling(temperature, top_k, top_p, SIZE)


def _kept(logits, **settings):
    return np.isfinite(samplers.filter_logits(jnp.asarray(logits), _sampling(**settings)))


def _noise(seed, index, step, size=SIZE):
    """Noise of rows that differ in the index, as a NumPy array."""
    words = np.tile(samplers.seed_words(seed), (len(index), 1))
    steps = np.full(len(index), step, np.int32)
    return np.asarray(samplers.gumbel_noise(words, np.asarray(index, np.uint32), steps, size))


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_temperature_0_is_the_argmax_whatever_the_noise(logits):
    noise = np.full_like(logits, 0)
    noise[:, 3] = 1e4
    chosen = samplers.sample_token(logits, noise, _sampling(temperature=0, top_k=5, top_p=0.9))
    np.testing.assert_array_equal(chosen, logits.argmax(-1))


def test_noise_is_scaled_as_if_the_logits_were_divided_by_the_temperature(logits):
    noise = np.random.default_rng(1).gumbel(size=logits.shape).astype(np.float32)
    chosen = samplers.sample_token(logits, noise, _sampling(temperature=0.7))
    np.testing.assert_array_equal(chosen, (logits / 0.7 + noise).argmax(-1))


@pytest.mark.parametrize("top_k", [1, 4, SIZE])
def test_top_k_keeps_the_k_likeliest(logits, top_k):
    rank = (-logits).argsort(-1).argsort(-1)
    np.testing.assert_array_equal(_kept(logits, top_k=top_k), rank < top_k)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(logits, top_p, temperature):
    kept = _kept(logits, top_p=top_p, temperature=temperature)
    for row, probability in enumerate(_softmax(logits / temperature)):
        order = (-probability).argsort()
        reached = np.cumsum(probability[order])
        number = 1 if top_p < 1e-3 else SIZE if top_p == 1 else int((reached < top_p).sum()) + 1
        np.testing.assert_array_equal(np.flatnonzero(kept[row]), np.sort(order[:number]))


def test_top_p_1_keeps_all_of_a_whole_codebook():
    peaked = np.linspace(0, -30, 16384, dtype=np.float32)[None]
    for top_p in (1, 1.0, 1 - 1e-12):
        sampling = samplers.make_sampling(1.0, None, top_p, 16384)
        assert np.isfinite(samplers.filter_logits(jnp.asarray(peaked), sampling)).all()
    below = samplers.make_sampling(1.0, None, 0.999, 16384)
    assert not np.isfinite(samplers.filter_logits(jnp.asarray(peaked), below)).all()


def test_top_p_counts_what_top_k_left(logits):
    kept = _kept(logits, top_k=3, top_p=0.6)
    for row in range(len(logits)):
        order = (-logits[row]).argsort()[:3]
        number = int((np.cumsum(_softmax(logits[row][order])) < 0.6).sum()) + 1
        np.testing.assert_array_equal(np.flatnonzero(kept[row]), np.sort(order[:number]))


@pytest.mark.parametrize("temperature", [1e30, 3e38])
def test_a_temperature_that_overflows_chooses_among_what_is_left(logits, temperature):
    index = np.arange(200)
    noise = _noise(1, index, 0)
    sampling = _sampling(temperature=temperature, top_k=3)
    chosen = samplers.sample_token(jnp.broadcast_to(logits[0], (200, SIZE)), noise, sampling)
    assert set(np.asarray(chosen)) == set((-logits[0]).argsort()[:3])


def test_every_row_has_its_own_settings_and_noise(logits):
    """A row gives what it gives alone; a row without a filter has top_k = V and top_p = 1."""
    settings = [dict(temperature=0.5, top_k=3), dict(temperature=2.0, top_p=0.7), dict()]
    rows = samplers.Sampling(
        np.array([0.5, 2, 1], np.float32),
        np.array([3, SIZE, SIZE], np.int32),
        np.array([1, 0.7, 1], np.float32),
    )
    seeds, index = [1, 2**40, 3], np.array([7, 0, 9], np.uint32)
    words, steps = np.stack([*map(samplers.seed_words, seeds)]), np.array([0, 5, 2], np.int32)
    noise = samplers.gumbel_noise(words, index, steps, SIZE)
    kept, chosen = samplers.filter_logits(logits, rows), samplers.sample_token(logits, noise, rows)
    for i in range(3):
        np.testing.assert_array_equal(noise[i], _noise(seeds[i], index[i : i + 1], steps[i])[0])
        alone = _sampling(**settings[i])
        np.testing.assert_array_equal(kept[i], samplers.filter_logits(logits[i : i + 1], alone)[0])
        expected = samplers.sample_token(logits[i : i + 1], noise[i : i + 1], alone)
        assert chosen[i] == expected[0]
    peaked = np.tile(np.linspace(0, -30, 16384, dtype=np.float32), (2, 1))
    mixed = samplers.Sampling(np.ones(1, np.float32), None, np.array([1, 0.999], np.float32))
    finite = np.isfinite(samplers.filter_logits(peaked, mixed)).all(axis=1)
    np.testing.assert_array_equal(finite, [True, False])


def test_without_filters_the_logits_are_left_alone(logits):
    np.testing.assert_array_equal(samplers.filter_logits(logits, _sampling()), logits)


def test_samples_follow_the_softmax():
    logits, number = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), 20_000
    index = np.arange(number)
    noise = _noise(1, index, 0, 4)
    chosen = samplers.sample_token(jnp.broadcast_to(logits, (number, 4)), noise, _sampling())
    counts = np.bincount(np.asarray(chosen), minlength=4) / number
    # four standard deviations of the largest
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=4 * (0.25 / number) ** 0.5)


def test_noise_depends_on_seed_index_and_step_and_on_nothing_else():
    batch = _noise(5, [0, 1, 2], 3)
    np.testing.assert_array_equal(_noise(5, [2], 3)[0], batch[2])
    others = [batch[0], batch[1], batch[2], _noise(6, [0], 3)[0], _noise(5, [0], 4)[0]]
    for i, one in enumerate(others):
        assert all(np.abs(one - other).max() > 0.1 for other in others[:i])


def test_noise_does_not_follow_the_default_generator():
    usual = _noise(0, [0], 0)
    with jax.default_prng_impl("rbg"):
        again = _noise(0, [0], 0)
    np.testing.assert_array_equal(again, usual)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, None, None), r"temperature must be at least 0 .*, got -0.1"),
        ((float("nan"), None, None), "temperature must be a finite number, got nan"),
        (("1", None, None), "temperature must be a finite number, got '1'"),
        ((1.0, 0, None), "top_k must be an integer of at least 1, got 0"),
        ((1.0, 13, None), "top_k must be at most 12, got 13"),
        ((1.0, 2**31, None), r"top_k must be below 2\*\*31, got 2147483648"),
        ((1.0, 2.0, None), "top_k must be an integer of at least 1, got 2.0"),
        ((1.0, None, 0.0), r"top_p must be in \(0, 1\], got 0.0"),
        ((1.0, None, 1.01), r"top_p must be in \(0, 1\], got 1.01"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        samplers.make_sampling(*settings, SIZE)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", None, True, np.bool_(True), np.ones(1, int)])
def test_seeds_that_are_no_64_bit_numbers_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*64\), got "):
        checks.check_seed(seed)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_keys_of_seeds_below_32_bits_are_those_of_jax(seed):
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    np.testing.assert_array_equal(samplers.seed_words(seed), jax.random.key_data(key))


def test_both_words_of_a_seed_decide():
    seeds = [5, 2**32 + 5, 5 * 2**32, 2**63 + 5, 2**64 - 1]
    noises = [_noise(seed, [0], 0) for seed in seeds]
    for i, one in enumerate(noises):
        assert all(np.abs(one - other).max() > 0.1 for other in noises[:i])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}])
def test_logits_that_are_not_finite_give_no_index(logits, bad, settings):
    damaged = logits.copy()
    damaged[1, 4] = bad
    noise = np.zeros_like(logits)
    chosen = samplers.sample_token(damaged, noise, _sampling(**settings))
    np.testing.assert_array_equal(chosen, [logits[0].argmax(), SIZE, logits[2].argmax()])


def test_logits_at_the_ends_of_float32_give_an_index(logits):
    extreme = logits.copy()
    extreme[:, 4], extreme[:, 5] = checks.FLOAT32_MAX, -checks.FLOAT32_MAX
    noise = np.ones_like(logits)
    chosen = samplers.sample_token(extreme, noise, _sampling(temperature=3e38, top_k=2))
    assert (np.asarray(chosen) < SIZE).all()
