"""The optimizer, the steps and the loop of training, on a model of a few thousand numbers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from tiny_janus import CODES, tiny_model, tiny_params

from janus_jax.models.vq import l2_normalize
from janus_jax.shapes.loop import generated_batches, run_steps
from janus_jax.shapes.vq_loss import USAGE_DECAY, make_vq_step
from janus_jax.shapes.vq_loss import reset_dead_codes as move
from janus_jax.training.step import (
    default_promotion,
    first_state,
    make_optimizer,
    split_model,
)

reset_dead_codes = jax.jit(move)


def config(**changes) -> ConfigDict:
    """Settings of 12 steps."""
    settings = dict(
        seed=0,
        steps=12,
        log_every=3,
        save_every=5,
        learning_rate=1e-2,
        end_learning_rate=1e-3,
        warmup_steps=2,
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        quantise_from=0,
        dead_code_usage=0.02,
    )
    return ConfigDict(settings | changes)


def by_path(state) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.array(x[...]) for path, x in nnx.to_flat_state(state)}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)


def test_a_pattern_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="trained='vq'"):
        split_model(tiny_model(), "vq")  # matched from the beginning of gen_vq.codebook
    _, params, frozen = split_model(tiny_model(), r"gen_vq\.codebook")
    assert list(by_path(params)) == ["gen_vq.codebook"]
    assert len(by_path(frozen)) == len(by_path(tiny_params()[1])) - 1


@pytest.fixture(scope="module")
def vq_run():
    """16 steps on one batch, quantised from step 4 on, codes moved up to step 12."""
    cfg = config(steps=16, quantise_from=4, dead_code_usage=0.0)
    graph, params, frozen = split_model(tiny_model(), "gen_vq")
    optimizer = make_optimizer(cfg)
    step = make_vq_step(graph, frozen, optimizer, cfg)
    state, usage, history = first_state(params, optimizer), jnp.zeros(CODES), []
    for _ in range(16):
        state, usage, metrics = step(state, usage, images(4), np.arange(16, dtype=np.int32))
        params = jax.device_get(state.params)
        history.append(jax.device_get(metrics) | dict(params=params, usage=np.array(usage)))
    return graph, frozen, history


def test_steps_of_the_vq_lower_the_loss(vq_run):
    *_, history = vq_run
    losses = [metrics["l1"] + metrics["l2"] for metrics in history]
    assert losses[3] < 0.9 * losses[0] and losses[-1] < losses[4]


def test_only_the_vq_is_trained(vq_run):
    graph, frozen, history = vq_run
    after = by_path(nnx.state(nnx.merge(graph, history[-1]["params"], frozen)))
    for path, value in by_path(tiny_params()[1]).items():
        assert np.array_equal(value, after[path]) != path.startswith("gen_vq."), path


def test_codes_lie_on_latents_until_these_are_quantized(vq_run):
    """Before step 4 every code is on a latent of its batch and counts as used."""
    graph, frozen, history = vq_run
    latents_of = jax.jit(lambda vq, pixels: l2_normalize(vq.latents(pixels)))
    for earlier, later in itertools.pairwise(history[:4]):
        vq = nnx.merge(graph, earlier["params"], frozen).gen_vq
        pixels = images(4).astype(np.float32) / 127.5 - 1
        latents = np.asarray(latents_of(vq, pixels)).reshape(-1, 4)
        codes = np.asarray(later["params"]["gen_vq"]["codebook"][...])
        distance = np.abs(codes[:, None] - latents).max(-1).min(-1)
        assert distance.max() < 1e-5
        assert (later["usage"] == 1).all()
    before, first = history[3], history[4]
    assert np.isclose(first["usage"].sum(), USAGE_DECAY * CODES + (1 - USAGE_DECAY) * 16)
    moved = np.abs(first["params"]["gen_vq"]["codebook"] - before["params"]["gen_vq"]["codebook"])
    assert moved.max() < 0.011  # a step of the optimizer at most


def test_only_dead_codes_move_and_to_latents():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(40, 4)).astype(np.float32)
    latents = np.asarray(l2_normalize(rng.normal(size=(30, 4)).astype(np.float32)))
    usage = rng.uniform(0, 0.1, 40).astype(np.float32)
    dead = usage < 0.05
    assert 10 < dead.sum() < 30
    moved, counts = reset_dead_codes(codebook, usage, latents, jax.random.key(0), 0.05)
    np.testing.assert_array_equal(moved[~dead], codebook[~dead])
    np.testing.assert_array_equal(counts, np.where(dead, 1, usage))
    chosen = (np.asarray(moved)[dead][:, None] == latents).all(-1)
    assert (chosen.sum(1) == 1).all()
    assert len(set(chosen.argmax(1))) > dead.sum() / 2  # not one latent for all


def test_latents_far_from_every_code_are_preferred():
    """Of 100 latents 95 are on the code, whatever its length: only the other 5 are taken."""
    codebook = np.zeros((50, 3), np.float32)
    codebook[:, 0] = np.linspace(0.5, 3, 50)
    latents = np.tile(np.float32([1, 0, 0]), (100, 1))
    latents[95:] = [0, 1, 0]
    usage = np.r_[np.ones(10), np.zeros(40)].astype(np.float32)
    moved, _ = reset_dead_codes(codebook, usage, latents, jax.random.key(1), 0.5)
    np.testing.assert_array_equal(moved[10:], np.tile(np.float32([0, 1, 0]), (40, 1)))


def test_of_codes_that_mean_the_same_the_most_used_stays():
    """Codes 0, 1 and 2 point the same way, 3 another; all are used."""
    codebook = np.float32([[1, 0, 0], [2, 0.1, 0], [1, 0, 0.05], [0, 1, 0]])
    usage = np.float32([2, 3, 1, 1])
    latents = np.float32([[0, 0, 1]])
    key = jax.random.key(0)
    moved, counts = reset_dead_codes(codebook, usage, latents, key, 0.5)
    np.testing.assert_array_equal(moved, [[0, 0, 1], codebook[1], [0, 0, 1], codebook[3]])
    np.testing.assert_array_equal(counts, [1, 3, 1, 1])
    unmoved, _ = reset_dead_codes(codebook, usage, latents, key, -1.0)
    np.testing.assert_array_equal(unmoved, codebook)


def learning_rate(cfg: ConfigDict, step: int) -> float:
    """Linear from 0, then half a cosine: what the docstring's words mean."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / (cfg.steps - cfg.warmup_steps)
    wave = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.end_learning_rate + (cfg.learning_rate - cfg.end_learning_rate) * wave


def test_the_optimizer_is_torchs_adamw_with_clipping_and_schedule():
    """Gradients of norm 0.3 to 30, so that some are clipped and some are not."""
    cfg = config(steps=8, warmup_steps=3, weight_decay=0.1)
    rng = np.random.default_rng(0)
    params = dict(a=rng.normal(size=(3, 4)), b=rng.normal(size=5))
    params = {name: value.astype(np.float32) for name, value in params.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = make_optimizer(cfg)
    state = optimizer.init(params)
    update = jax.jit(default_promotion()(optimizer.update))
    for step in range(8):
        scale = 10.0 ** rng.uniform(-1, 1)
        grads = {k: (scale * rng.normal(size=v.shape)).astype("f") for k, v in params.items()}
        updates, state = update(grads, state, params)
        params = {name: params[name] + updates[name] for name in params}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), cfg.max_grad_norm)
        adamw.param_groups[0]["lr"] = learning_rate(cfg, step)
        adamw.step()
        for name, parameter in theirs.items():
            expected = parameter.detach().numpy()
            np.testing.assert_allclose(params[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup_steps", [-1, 12, 20])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_steps):
    values = rf"warmup_steps={warmup_steps} steps=12$"
    with pytest.raises(ValueError, match=values):
        make_optimizer(config(warmup_steps=warmup_steps))


def counting_step(state, batch):
    """A step whose state is the sum of the batches."""
    return state + batch, dict(loss=batch)


def test_the_loop_saves_now_and_then_and_after_the_last_step():
    saved = []
    state = run_steps(np.float32(0), counting_step, range(1, 13), config(), saved.append)
    assert saved == [15, 55, 78] and state == 78
    saved.clear()
    run_steps(np.float32(0), counting_step, range(1, 11), config(steps=10), saved.append)
    assert saved == [15, 55]


def test_a_metric_that_is_not_a_number_stops_the_run():
    saved, batches = [], [1.0] * 7 + [math.nan] + [1.0] * 4
    with pytest.raises(FloatingPointError, match=r"loss nan.* 8\b"):
        run_steps(0.0, counting_step, batches, config(log_every=4), saved.append)
    assert saved == [5]


def test_a_state_that_is_not_finite_does_not_replace_a_good_one():
    """The metric is logged too rarely to detect it."""
    saved, batches = [], [1.0] * 6 + [math.inf] + [1.0] * 5
    with pytest.raises(FloatingPointError, match=r"step 10\b"):
        run_steps(0.0, counting_step, batches, config(log_every=11), saved.append)
    assert saved == [5]


def test_every_step_samples_from_seed_and_step_alone():
    def make(rng, step):
        return step, int(rng.integers(10**9))

    expected = [(s, int(np.random.default_rng((7, s)).integers(10**9))) for s in range(5)]
    assert list(generated_batches(make, config(seed=7, steps=5))) == expected
