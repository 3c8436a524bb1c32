"""LoRA on a decoder of two layers: adapted, trained and merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from janus_jax.interop.load import abstract
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.layers import linear
from janus_jax.models.llama import LlamaConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig
from janus_jax.training.lora import ADAPTERS, LoRAConfig, LoRADot, add_adapters, lora_factors
from janus_jax.training.step import split_model

BLOCK_TARGETS = r"layers\.\d+\.(self_attn\.[qo]_proj|mlp\.down_proj)"
CONFIG = LoRAConfig(3, 6.0, rf"language_model\.({BLOCK_TARGETS}|lm_head)|gen_head\.out")
LAYERS = [
    "gen_head.out",
    *(
        f"language_model.layers.{i}.{name}"
        for i in range(2)
        for name in ("mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj")
    ),
    "language_model.lm_head",
]


@functools.cache
def tiny_shapes() -> tuple[nnx.GraphDef, nnx.State]:
    """Of a Janus whose parts beside the decoder are as small as they can be."""
    decoder = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=64,
    )
    cfg = JanusConfig(
        und_encoder=SiglipConfig(4, 2, width=8, num_layers=1, num_heads=2, mlp_dim=16),
        und_aligner_depth=1,
        gen_vq=VQConfig(
            12, 4, ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=6, norm_num_groups=2
        ),
        gen_aligner_depth=1,
        gen_head_width=8,
        language_model=decoder,
    )
    return abstract(cfg)


def tiny_janus() -> Janus:
    """With random values, each time the same."""
    graph, shapes = tiny_shapes()
    rng = np.random.default_rng(0)

    def fill(leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + noise / 10 if leaf.ndim == 1 else noise / leaf.shape[-2] ** 0.5)

    return nnx.merge(graph, jax.tree.map(fill, shapes))


def by_path(state: nnx.State) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def with_values(state: nnx.State, values) -> nnx.State:
    """The state with other arrays, given by path."""
    flat = nnx.to_flat_state(state)
    leaves = [leaf.replace(jnp.asarray(values[".".join(map(str, path))])) for path, leaf in flat]
    return nnx.from_flat_state(list(zip([path for path, _ in flat], leaves, strict=True)))


@jax.jit
def run(graph: nnx.GraphDef, trained: nnx.State, frozen: nnx.State):
    """Logits of both heads for a fixed input, and a loss's gradient by the trained parameters."""
    rng = np.random.default_rng(1)
    embeds = rng.normal(size=(2, 5, 32)).astype(np.float32)
    weights = rng.normal(size=(2, 5, 52)).astype(np.float32)

    def loss(trained):
        model = nnx.merge(graph, trained, frozen)
        hidden, _ = model.language_model(embeds)
        heads = model.language_model.lm_head, model.gen_head
        logits = jnp.concatenate([head(hidden) for head in heads], axis=-1)
        return jnp.sum(weights * logits), logits

    grads, logits = jax.grad(loss, has_aux=True)(trained)
    return logits, grads


@pytest.fixture(scope="module")
def plain():
    """Graph, kernels that CONFIG adapts, other parameters: of the model without adapters."""
    return split_model(tiny_janus(), rf"({CONFIG.targets})\.kernel")


@pytest.fixture(scope="module")
def new():
    """Graph, adapters, other parameters: of the model with adapters as they begin."""
    model = tiny_janus()
    add_adapters(model, CONFIG, rngs=nnx.Rngs(2))
    return split_model(model, ADAPTERS)


@pytest.fixture(scope="module")
def trained(new):
    """As `new`, with other values in every adapter."""
    rng = np.random.default_rng(3)
    graph, adapters, frozen = new
    changed = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 4, adapters)
    return graph, changed, frozen


def test_only_adapters_are_trained(new, plain):
    _, adapters, frozen = new
    shapes = {path: x.shape for path, x in by_path(adapters).items()}
    assert sorted(shapes) == [f"{path}.dot_general.{name}" for path in LAYERS for name in "ab"]
    down = "language_model.layers.1.mlp.down_proj.dot_general"
    assert (shapes[f"{down}.a"], shapes[f"{down}.b"]) == ((48, 3), (3, 32))
    assert by_path(frozen).keys() == by_path(plain[1]).keys() | by_path(plain[2]).keys()


def test_aligners_begin_as_the_paper_says(new):
    adapters = by_path(new[1])
    for path in LAYERS:
        a, b = (np.asarray(adapters[f"{path}.dot_general.{name}"]) for name in "ab")
        bound = len(a) ** -0.5
        assert 0.7 * bound < np.abs(a).max() <= bound
        assert abs(a.mean()) < 0.3 * bound
        assert not b.any()
    first, second = (adapters[f"{path}.dot_general.a"] for path in (LAYERS[2], LAYERS[3]))
    assert not np.array_equal(first, second)


def test_new_adapters_change_nothing(new, plain):
    np.testing.assert_allclose(run(*new)[0], run(*plain)[0], rtol=0, atol=1e-5)


def summed_kernels(adapters: nnx.State, frozen: nnx.State) -> dict[str, np.ndarray]:
    """W + scale A B of every adapted layer, by the path of W."""
    kernels, factors = by_path(frozen), lora_factors(by_path(adapters))
    return {path: kernels[path] + CONFIG.scale * a @ b for path, (a, b) in factors.items()}


def test_adapted_layers_give_what_the_summed_kernels_give(trained, plain):
    graph, kernels, others = plain
    found = summed_kernels(*trained[1:])
    assert found.keys() == by_path(kernels).keys()
    expected = run(*trained)[0]
    logits = run(graph, with_values(kernels, found), others)[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - run(*plain)[0]).max() > 0.1


def test_gradients_are_those_of_the_sum(trained, plain):
    """By W + scale A B in plain layers: dA = scale dW B^T, dB = scale A^T dW."""
    graph, kernels, others = plain
    _, adapters, frozen = trained
    found = summed_kernels(adapters, frozen)
    summed = by_path(run(graph, with_values(kernels, found), others)[1])
    grads, values = by_path(run(*trained)[1]), by_path(adapters)
    assert grads.keys() == values.keys()
    for path in LAYERS:
        a, b = (f"{path}.dot_general.{name}" for name in "ab")
        dw = 2.0 * np.asarray(summed[f"{path}.kernel"])
        for name, expected in ((a, dw @ values[b].T), (b, values[a].T @ dw)):
            size = np.abs(expected).max()
            assert size > 0.1
            np.testing.assert_allclose(grads[name], expected, rtol=0, atol=1e-5 * size)


def test_aligners_stay_float32_where_layers_compute_in_bfloat16():
    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    layer = linear(16, 8, **types, rngs=nnx.Rngs(0))
    layer.dot_general = nnx.data(LoRADot(layer, CONFIG, rngs=nnx.Rngs(1)))
    graph, adapters, frozen = nnx.split(layer, lambda path, _: "dot_general" in path, ...)

    @jax.jit
    @jax.grad
    def gradient(adapters):
        out = nnx.merge(graph, adapters, frozen)(jnp.ones((2, 3, 16)))
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32))

    grads = gradient(adapters)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    # dW is 6 everywhere, as six positions of ones are summed, and the scale 2
    down = np.asarray(by_path(adapters)["dot_general.a"]).sum(0)
    np.testing.assert_allclose(by_path(grads)["dot_general.b"][:, 0], 12 * down, rtol=0, atol=0.1)


def test_a_model_of_shapes_alone_is_adapted(new):
    model = nnx.merge(*tiny_shapes())
    add_adapters(model, CONFIG, rngs=nnx.Rngs(2))
    graph, adapters, frozen = split_model(model, ADAPTERS)
    assert graph == new[0]
    assert {type(x) for x in jax.tree.leaves(frozen)} == {jax.ShapeDtypeStruct}
    expected = by_path(new[1])
    for path, value in by_path(adapters).items():
        np.testing.assert_array_equal(value, expected[path])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), r"rank.*\b0\b"),
        (dict(rank=2.0), r"rank.*\b2\.0\b"),
        (dict(rank=True), "rank.*True"),
        (dict(alpha=0), r"alpha.*\b0\b"),
        (dict(alpha=float("nan")), "alpha.*nan"),
        (dict(alpha="8"), "alpha.*'8'"),
        (dict(targets="q_proj("), r"targets.*'q_proj\('"),
        (dict(targets=None), "targets.*None"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        LoRAConfig(**(dict(rank=4, alpha=8.0, targets=".*") | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj", "targets.*'q_proj'"),
        (r"language_model\.norm", "targets.*language_model.*norm'"),
        (r"gen_vq\..*", r"gen_vq\.\S+ .*image tokenizer"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(targets, message):
    model = nnx.merge(*tiny_shapes())
    with pytest.raises(ValueError, match=message) as error:
        add_adapters(model, LoRAConfig(2, 2.0, targets), rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)
    assert not any(isinstance(module, LoRADot) for _, module in nnx.iter_modules(model))


def test_a_second_adapter_is_refused():
    model = nnx.merge(*tiny_shapes())
    add_adapters(model, CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"gen_head\.out already"):
        add_adapters(model, CONFIG, rngs=nnx.Rngs(0))
