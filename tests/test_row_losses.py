"""The loss of packed rows: against the plain formula, and packed against alone."""

import functools
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import janus_jax
from janus_jax.data import packing
from janus_jax.data.examples import ExampleMaker
from janus_jax.data.records import KINDS, Record
from janus_jax.processing.images import encode_png
from janus_jax.shapes import scenes
from janus_jax.training.cross_entropy import cross_entropies
from janus_jax.training.row_losses import normalize, row_losses

pytestmark = pytest.mark.usefixtures("quick_compiles")


class LinearHead(nnx.Module):
    """A head of one matrix; `computed` has an entry for each time that it ran."""

    def __init__(self, kernel):
        self.kernel, self.computed = nnx.Param(kernel), []

    def __call__(self, x):
        jax.debug.callback(lambda: self.computed.append(1))
        return (x @ self.kernel[...]).astype(jnp.float32)


def plain(head, hidden, targets, target_mask):
    losses = optax.softmax_cross_entropy_with_integer_labels(head(hidden), targets)
    return jnp.where(target_mask, losses, 0.0)


@pytest.fixture(scope="module")
def problem():
    """hidden [3, 22, 8], targets and a mask; the last row has no target."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, 22, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (3, 22)))
    target_mask = rng.random((3, 22)) < 0.4
    target_mask[2] = False
    return hidden, targets, jnp.asarray(target_mask)


@pytest.mark.parametrize("chunk", [1, 5, 22, 100])
def test_chunks_give_the_plain_formula_and_its_gradients(problem, chunk):
    hidden, targets, target_mask = problem
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((8, 50)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(2).random(target_mask.shape), jnp.float32)

    def weighed(formula, *more):
        def loss(kernel, hidden):
            losses = formula(LinearHead(kernel), hidden, targets, target_mask, *more)
            return jnp.sum(weights * losses), losses

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(kernel, hidden)

    (grads, losses), (want_grads, want) = weighed(cross_entropies, chunk), weighed(plain)
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-5)
    assert not np.asarray(losses)[~np.asarray(target_mask)].any()


def test_the_head_is_not_computed_where_no_target_is(problem):
    hidden, targets, target_mask = problem
    head = LinearHead(jnp.ones((8, 50), jnp.float32))

    def losses(hidden):
        return jnp.sum(cross_entropies(head, hidden, targets, target_mask, 4))

    jax.block_until_ready(jax.jit(jax.grad(losses))(hidden))
    jax.effects_barrier()
    chunks = -(-int(target_mask.sum(1).max()) // 4)
    assert chunks < -(-22 // 4) and len(head.computed) == 2 * chunks  # forward and backward


def test_a_whole_row_of_logits_never_exists(problem):
    hidden, targets, target_mask = problem

    def loss(kernel):
        return jnp.sum(cross_entropies(LinearHead(kernel), hidden, targets, target_mask, 4))

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((8, 50), jnp.float32)))
    assert "f32[3,4,50]" in text and "f32[3,22,50]" not in text and "f32[6,3,4,50]" not in text


class TwoLayerHead(nnx.Module):
    """A head with a frozen and a trained matrix."""

    def __init__(self, frozen, trained):
        self.frozen, self.trained = nnx.Param(frozen), nnx.Param(trained)

    def __call__(self, x):
        return x @ self.frozen[...] @ self.trained[...]


def test_no_gradient_of_a_frozen_matrix_is_computed(problem):
    hidden, targets, target_mask = problem
    frozen, trained = jnp.ones((8, 7), jnp.float32), jnp.ones((7, 50), jnp.float32)

    def loss(hidden, trained, frozen):
        head = TwoLayerHead(frozen, trained)
        return jnp.sum(cross_entropies(head, hidden, targets, target_mask, 4))

    def products(argnums):
        program = jax.jit(jax.grad(loss, argnums)).lower(hidden, trained, frozen)
        return program.as_text().count("stablehlo.dot_general")

    assert products((0, 1, 2)) == products((0, 1)) + 1


def test_matrices_are_multiplied_in_the_dtype_of_the_hidden_states(problem):
    hidden, targets, target_mask = problem
    hidden = hidden.astype(jnp.bfloat16)

    def loss(kernel):
        head = LinearHead(kernel)
        losses = cross_entropies(head, hidden, targets, target_mask, 4)
        return jnp.sum(losses)

    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((8, 50), jnp.float32)))
    assert set(re.findall(r":(\w+)\[[\d,]*\] = dot_general", text)) == {"bf16"}


def test_gradients_of_chunks_are_added_up_in_float32():
    """Of 512 equal gradients, a sum in bfloat16 would only see the first 256."""
    hidden, targets = jnp.ones((1, 512, 1), jnp.bfloat16), jnp.zeros((1, 512), jnp.int32)

    def loss(kernel):
        mask = jnp.ones((1, 512), bool)
        return jnp.sum(cross_entropies(LinearHead(kernel), hidden, targets, mask, 1))

    grad = jax.jit(jax.grad(loss))(jnp.zeros((1, 2), jnp.float32))
    np.testing.assert_allclose(grad, [[-256, 256]], rtol=1e-3)


def test_a_target_that_the_head_does_not_have_gives_nan(problem):
    hidden, targets, target_mask = problem
    head = LinearHead(jnp.ones((8, 50), jnp.float32))
    losses = cross_entropies(head, hidden, targets + 50, target_mask, 4)
    np.testing.assert_array_equal(np.isnan(losses), target_mask)


@pytest.fixture(scope="module")
def janus():
    return janus_jax.load(dtype="float32")


@pytest.fixture(scope="module")
def examples(janus):
    """Two of each kind, with indices for the images to generate."""
    rng = np.random.default_rng(0)
    make = ExampleMaker(janus.processor, 96, 36, 1024, 128, 2, 1, tokenized=True)
    images = (encode_png(scenes.draw(scenes.sample_mixed(rng))),)
    records = [
        Record("understanding", (("How many objects are there?", "2"),), images=images),
        Record("text", text="a red circle left of a blue square"),
        Record("generation", text="two red circles", indices=rng.integers(0, 1024, 36)),
        Record("text", text="three green crosses"),
        Record("understanding", (("Is there a circle?", "yes"),)),
        Record("generation", text="a square", indices=rng.integers(0, 1024, 36)),
    ]
    return [make(record, np.random.default_rng(3)) for record in records]


def in_rows(examples, length, pad_id, max_input=2, max_generated=2):
    dataset = grain.MapDataset.source(examples).to_iter_dataset()
    rows = list(packing.pack_examples(dataset, length, max_input, max_generated, pad_id, seed=0))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "records"}


losses_of = jax.jit(functools.partial(row_losses, chunk=16), static_argnames="images")


def test_packed_equals_alone(janus, examples):
    pad_id, images = janus.processor.tokenizer.pad_id, janus.processor.image_config
    packed = in_rows(examples, 256, pad_id)
    assert packed["segment_ids"].max() >= 3
    alone = [in_rows([example], 256, pad_id) for example in examples]
    stacked = {name: np.concatenate([one[name] for one in alone]) for name in packed}
    empty = len(examples) - len(packed["tokens"])  # rows, for one program is to take both
    assert empty > 0
    packed = {
        name: np.pad(rows, [(0, empty)] + [(0, 0)] * (rows.ndim - 1))
        for name, rows in packed.items()
    }
    graph, params = nnx.split(janus.model)

    def total(params, rows):
        found = row_losses(nnx.merge(graph, params), rows, images, 16)
        return sum(loss for loss, _ in found.values()), found

    grad = jax.jit(jax.grad(total, has_aux=True, allow_int=True))
    (grads, found), (want_grads, want) = grad(params, packed), grad(params, stacked)
    for kind in KINDS:
        assert found[kind][1] == want[kind][1] > 0
        np.testing.assert_allclose(found[kind][0], want[kind][0], rtol=1e-5)
    grads, want_grads = (jax.tree.leaves(jax.device_get(x)) for x in (grads, want_grads))
    for one, other in zip(grads, want_grads, strict=True):
        scale = max(np.abs(other).max(), 1e-3)
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-4)


@pytest.mark.parametrize("tokenized", [False, True])
def test_rows_may_have_no_place_for_images(janus, tokenized):
    make = ExampleMaker(janus.processor, 96, 36, 1024, 64, 0, 0, tokenized)
    example = make(Record("text", text="a red circle"), np.random.default_rng(0))
    rows = in_rows([example], 64, 0, 0, 0)
    found = losses_of(janus.model, rows, janus.processor.image_config)
    assert float(found["text"][1]) == example["loss_mask"].sum() and float(found["text"][0]) > 0


def test_images_are_normalized_as_the_processor_does(janus):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), np.uint8)
    want = janus.processor.pixels([pixels[0]])
    found = normalize(jnp.asarray(pixels), janus.processor.image_config)
    np.testing.assert_allclose(found, want, atol=1e-6)
