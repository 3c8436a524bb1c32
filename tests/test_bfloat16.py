"""In bfloat16, no layer has a larger error than in torch (random tiny weights)."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_reference import call, rebuilt, tiny_pair, uniform

from janus_jax.models.layers import linear, with_float32_output
from janus_jax.models.siglip import Siglip

BFLOAT16 = jnp.bfloat16
IMAGES = 64


@pytest.fixture(scope="module")
def models():
    """A torch model in bfloat16, and ours in float32 and bfloat16, with the same weights."""
    theirs, exact = tiny_pair()
    rough = copy.deepcopy(theirs).to(torch.bfloat16)
    # the weights that both round alike
    weights = rebuilt(exact, exact.cfg.with_dtype(BFLOAT16))
    return rough, rebuilt(weights, exact.cfg), weights


def _error(got, exact) -> float:
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - np.asarray(exact)) ** 2)))


def _embed(siglip, pixels):
    return jax.jit(Siglip.embed)(siglip, pixels)


PARTS = {
    "patch embedding": (
        (IMAGES, 16, 16, 3),
        lambda model, x: model.model.vision_model.embeddings(x.movedim(-1, 1)),
        lambda model, x: _embed(model.und_encoder, x),
    ),
    "SigLIP attention": (
        (IMAGES, 16, 24),
        lambda model, x: model.model.vision_model.encoder.layers[0].self_attn(x)[0],
        lambda model, x: call(model.und_encoder.blocks[0].attn, x),
    ),
    "SigLIP MLP": (
        (IMAGES, 16, 24),
        lambda model, x: model.model.vision_model.encoder.layers[0].mlp(x),
        lambda model, x: call(model.und_encoder.blocks[0].mlp, x),
    ),
    "SigLIP block": (
        (IMAGES, 16, 24),
        lambda model, x: model.model.vision_model.encoder.layers[0](x, None),
        lambda model, x: call(model.und_encoder.blocks[0], x),
    ),
    "SigLIP features": (
        (IMAGES, 16, 16, 3),
        lambda model, x: model.model.vision_model(x.movedim(-1, 1)).last_hidden_state,
        lambda model, x: call(model.und_encoder, x),
    ),
    "und_aligner": (
        (IMAGES, 16, 24),
        lambda model, x: model.model.aligner(x),
        lambda model, x: call(model.und_aligner, x),
    ),
    "gen_aligner": (
        (IMAGES, 16, 8),
        lambda model, x: model.model.generation_aligner(x),
        lambda model, x: call(model.gen_aligner, x),
    ),
    "gen_head": (
        (IMAGES, 16, 32),
        lambda model, x: model.model.generation_head(x),
        lambda model, x: call(model.gen_head, x),
    ),
    "SwiGLU": (
        (IMAGES, 16, 32),
        lambda model, x: model.model.language_model.layers[0].mlp(x),
        lambda model, x: call(model.language_model.layers[0].mlp, x),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_error_is_at_most_that_of_torch(models, part):
    shape, torch_part, own_part = PARTS[part]
    theirs, exact, ours = models
    x = jnp.asarray(uniform(*shape, seed=3)).astype(BFLOAT16)
    expected = own_part(exact, x.astype(jnp.float32))
    torch_x = torch.tensor(np.asarray(x, np.float32)).to(torch.bfloat16)
    error = _error(own_part(ours, x), expected)
    torch_error = _error(torch_part(theirs, torch_x).float().numpy(), expected)
    print(f"{part}: {error:.2e}, torch {torch_error:.2e}, ratio {error / torch_error:.3f}")
    assert error <= 1.005 * torch_error  # ties that round the other way


def test_a_layer_rounds_once():
    layer = linear(32, 8, dtype=BFLOAT16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = uniform(8, seed=1)
    x = jnp.asarray(uniform(64, 32)).astype(BFLOAT16)
    kernel = np.asarray(layer.kernel[...].astype(BFLOAT16), np.float32)
    exact = np.asarray(x, np.float32) @ kernel + np.asarray(layer.bias[...])
    np.testing.assert_array_equal(call(layer, x), jnp.asarray(exact).astype(BFLOAT16))


def test_gradients_are_those_of_a_rounded_product():
    x, kernel = (jnp.asarray(uniform(*s)).astype(BFLOAT16) for s in ((6, 5), (5, 4)))

    def loss(multiply, x, kernel):
        return jnp.sum(multiply(x, kernel).astype(BFLOAT16).astype(jnp.float32) ** 2)

    def dot(x, kernel, **options):
        return jax.lax.dot(x, kernel, **options)

    def float32_dot(x, kernel):
        return with_float32_output(dot, x, kernel)

    grads = jax.grad(loss, argnums=(1, 2))(float32_dot, x, kernel)
    expected = jax.grad(loss, argnums=(1, 2))(jax.lax.dot, x, kernel)
    for got, want in zip(grads, expected, strict=True):
        assert got.dtype == BFLOAT16
        np.testing.assert_array_equal(got, want)
