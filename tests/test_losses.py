"""Losses other than the stages' are handed to the step, built from the log-probabilities of rows.

A preference loss (DPO) and a policy gradient are compared with the same formulas on single, not
packed examples and full logits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_janus import CODES, tiny_config, tiny_model

from janus_jax.interop.load import abstract, leaves_by_path, merge_params
from janus_jax.processing.images import ImageConfig
from janus_jax.training.row_losses import target_log_probs
from janus_jax.training.step import Loss, Objective, Terms, first_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, LENGTH, IMAGE_TOKENS, BETA = 4, 16, 4, 0.3
# two examples in a row: 3 tokens of a prompt and 5 of an answer; 2 of a prompt and an image
ANSWER, IMAGE = slice(3, 8), slice(10, 10 + IMAGE_TOKENS)
log_probs_of = functools.partial(target_log_probs, images=ImageConfig(16), chunk=3)


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Packed rows of an answer and an image, with what the losses need besides."""
    rng, column = np.random.default_rng(0), np.arange(LENGTH)
    segment_ids = np.where(column < 8, 1, np.where(column < IMAGE.stop, 2, 0))
    every_row = dict(
        segment_ids=segment_ids,
        positions=np.where(segment_ids == 1, column, np.where(segment_ids == 2, column - 8, 0)),
        image_mask=column < 0,
        gen_mask=(column >= IMAGE.start) & (column < IMAGE.stop),
        loss_mask=(column >= ANSWER.start) & (column < ANSWER.stop),
    )
    return dict(
        {name: np.stack([values] * ROWS) for name, values in every_row.items()},
        tokens=rng.integers(0, 20, (ROWS, LENGTH)),
        pixels=np.zeros((ROWS, 0, 4, 4, 3), np.uint8),
        generated=rng.integers(0, CODES, (ROWS, 1, IMAGE_TOKENS)),
        reference=rng.normal(-10, 3, (ROWS, 2)).astype(np.float32),
        advantages=rng.normal(size=(ROWS, 2)).astype(np.float32),
    )


def direct_log_probs(model, rows) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [ROWS, 5] of the answers and [ROWS, 4] of the images, each alone."""

    def hidden_of(embeds):
        return model.language_model(embeds)[0]

    def picked(logits, targets):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    said, prompt, image = rows["tokens"][:, :8], rows["tokens"][:, 8:10], rows["generated"][:, 0]
    text_logits = model.language_model.lm_head(hidden_of(model.language_model.embed(said)))
    parts = model.language_model.embed(prompt), model.embed_image_tokens(image)
    image_logits = model.gen_head(hidden_of(jnp.concatenate(parts, axis=1)))
    return picked(text_logits[:, 2:7], said[:, ANSWER]), picked(image_logits[:, 1:-1], image)


def preference(sums, rows) -> Terms:
    """DPO's terms. `reference` has the log-probabilities of the initial model by segment."""
    ratios = jnp.stack(sums, axis=1) - rows["reference"]
    margin, number = BETA * (ratios[:, 0] - ratios[:, 1]), jnp.float32(len(ratios))
    wins = jnp.sum(margin > 0, dtype=jnp.float32)
    return dict(preference=(-jnp.sum(jax.nn.log_sigmoid(margin)), number), wins=(wins, number))


def packed_terms(model, rows) -> Terms:
    """Terms of DPO, and REINFORCE with the advantage of each example, a mean over its tokens."""
    log_probs, text_mask, gen_mask = log_probs_of(model, rows)
    segments, mask = rows["segment_ids"], text_mask | gen_mask
    sums = [jnp.sum(jnp.where(segments == n, log_probs, 0), axis=1) for n in (1, 2)]
    advantages = jnp.take_along_axis(rows["advantages"], jnp.maximum(segments - 1, 0), axis=1)
    gain = jnp.sum(jnp.where(mask, advantages * log_probs, 0))
    return preference(sums, rows) | dict(policy=(-gain, jnp.sum(mask, dtype=jnp.float32)))


def direct_terms(model, rows) -> Terms:
    """The same terms from single examples."""
    parts = direct_log_probs(model, rows)
    gains = [jnp.sum(rows["advantages"][:, n, None] * part) for n, part in enumerate(parts)]
    policy = -sum(gains), jnp.float32(sum(part.size for part in parts))
    return preference([jnp.sum(part, axis=1) for part in parts], rows) | dict(policy=policy)


def objective_of(loss: Loss, weights: dict, params: dict) -> Objective:
    graph, state = abstract(tiny_config())
    return Objective(
        build=lambda params: merge_params(graph, state, params.__getitem__),
        dtype=jnp.float32,
        cast_by_model=(),
        loss=loss,
        weights=weights,
        accumulate=2,
        shardings={path: array.sharding for path, array in params.items()},
    )


def split_params() -> tuple[dict, dict]:
    """Returns trainable and frozen parameters by path."""
    params = dict(leaves_by_path(nnx.state(tiny_model())))
    frozen = {path: array for path, array in params.items() if path.startswith("gen_vq.")}
    return {path: array for path, array in params.items() if path not in frozen}, frozen


def test_a_step_follows_the_gradient_of_the_loss_that_it_is_given(rows):
    rate, weights, (params, frozen) = 0.01, dict(preference=2.0, policy=0.5), split_params()

    def direct(params):
        terms = direct_terms(objective.build(params | frozen), rows)
        total, weight = (sum(w * terms[name][i] for name, w in weights.items()) for i in (0, 1))
        return total / weight, (total / weight, terms)

    objective = objective_of(packed_terms, weights, params)
    grads, (value, terms) = jax.device_get(jax.jit(jax.grad(direct, has_aux=True))(params))
    expected = {path: np.asarray(params[path]) - rate * grad for path, grad in grads.items()}
    moved = {path.split(".")[0] for path, grad in grads.items() if np.abs(grad).max() > 1e-4}
    assert moved == {"language_model", "gen_head", "gen_aligner", "gen_embed"}

    optimizer = optax.sgd(rate)
    state = first_state(params, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(objective, optimizer, lambda _: rate, 0.0, shardings)
    state, metrics = step(jax.device_put(state, shardings), frozen, rows)
    for path, want in expected.items():
        np.testing.assert_allclose(state.params[path], want, atol=1e-5, err_msg=path)
    losses = [float(metrics["loss"])]
    np.testing.assert_allclose(losses[0], value, rtol=1e-5)
    assert terms.keys() == metrics["sums"].keys() == {"preference", "policy", "wins"}
    for name, (total, count) in terms.items():
        np.testing.assert_allclose(metrics["sums"][name], total, rtol=1e-5)
        assert metrics["counts"][name] == count > 0
    for _ in range(4):
        state, metrics = step(state, frozen, rows)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3


def test_log_probs_are_at_the_positions_that_predict(rows):
    """The masks tell apart text and image tokens; elsewhere the log-probability is 0."""
    model = tiny_model()
    log_probs, text_mask, gen_mask = jax.jit(log_probs_of)(model, rows)
    answers, images = jax.jit(direct_log_probs)(model, rows)
    assert log_probs.dtype == jnp.float32 and log_probs.shape == (ROWS, LENGTH)
    for mask, span, want in ((text_mask, ANSWER, answers), (gen_mask, IMAGE, images)):
        before = slice(span.start - 1, span.stop - 1)
        np.testing.assert_allclose(log_probs[:, before], want, rtol=1e-4, atol=1e-5)
        assert np.asarray(mask)[:, before].all() and mask.sum() == want.size
    assert not np.asarray(log_probs)[~np.asarray(text_mask | gen_mask)].any()


def test_a_weight_without_a_term_is_refused(rows):
    params, frozen = split_params()
    objective = objective_of(packed_terms, dict(policy=1.0, kl=0.1), params)
    with pytest.raises(ValueError, match=r"weights .*policy.*, got kl"):
        jax.eval_shape(objective.gradients, params, frozen, rows)


def test_a_term_must_not_have_the_name_of_another_value_in_the_log(rows):
    params, frozen = split_params()

    def loss(model, rows) -> Terms:
        return dict(loss=packed_terms(model, rows)["policy"])

    with pytest.raises(ValueError, match=r"reserved.*loss"):
        jax.eval_shape(objective_of(loss, dict(loss=1.0), params).gradients, params, frozen, rows)


@pytest.mark.parametrize("weights", [{}, dict(policy=0.0), dict(policy=1.0, wins=-2.0)])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match=f"weights.*{weights}"):
        objective_of(packed_terms, weights, {})
