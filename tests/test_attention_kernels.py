"""The kernels of attention: their results, their shards, and the platforms that they are chosen on.

The TPU kernels run in Pallas' interpreter. tests/aot compiles them.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import sharding
from janus_jax.models import attention_cuda, shards
from janus_jax.models.attention import attention, xla_attention
from janus_jax.models.attention_tpu import splash_attention

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Packed rows: examples of different lengths with padding at the end, a whole row, and only padding.
SEGMENT_IDS = np.repeat([[1, 2, 3, 0], [5, 5, 5, 5], [0, 0, 0, 0]], 64, axis=1)
SEGMENT_IDS[0, 50:60] = 2
USES = {
    "training rows": dict(causal=True, segment_ids=jnp.asarray(SEGMENT_IDS, jnp.int32)),
    "prefill": dict(causal=True, segment_ids=None),
    "image encoder": dict(causal=False, segment_ids=None),
}
interpreted = functools.partial(splash_attention, interpret=True)


def qkv(length: int, heads: int = 2, key_heads: int = 1, batch: int = 3) -> list[jax.Array]:
    """Returns random queries, keys and values with 16 elements a head."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, length, n, 16) for n in (heads, key_heads, key_heads)]
    return [
        2 * jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def value_and_gradients(function, arrays, causal, segment_ids) -> list[np.ndarray]:
    """Returns the output, and the gradients of a weighted sum of it."""

    def weighted_sum(*arrays):
        out = function(*arrays, segment_ids, causal=causal)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradient = jax.jit(jax.value_and_grad(weighted_sum, (0, 1, 2), has_aux=True))
    (_, out), gradients = gradient(*arrays)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_alike(ours, expected, tolerance: float) -> None:
    """Compares outputs and gradients, relative to the largest element of each."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


@pytest.mark.parametrize(
    "use, length",
    [("training rows", 640), ("training rows", 200), ("prefill", 200), ("image encoder", 200)],
)
def test_splash_equals_float32_attention(use, length):
    """Several blocks, a length that is no multiple of 128, and two query heads per key head."""
    causal, ids = USES[use].values()
    ids = None if ids is None else jnp.tile(ids, 3)[:, :length]
    arrays = qkv(length)
    exact = value_and_gradients(
        xla_attention, [x.astype(jnp.float32) for x in arrays], causal, ids
    )
    plain = value_and_gradients(xla_attention, arrays, causal, ids)
    assert_alike(value_and_gradients(interpreted, arrays, causal, ids), exact, 0.02)
    assert_alike(plain, exact, 0.02)


def test_examples_of_a_row_do_not_see_each_other():
    """Another value in one example changes no output and no gradient of the others in the row."""
    causal, ids = USES["training rows"].values()
    q, k, v = qkv(256)
    other = np.asarray(ids)[0] == 2
    changed = [x.at[0, other].add(1) for x in (q, k, v)]
    before, after = (
        value_and_gradients(interpreted, x, causal, ids) for x in ((q, k, v), changed)
    )
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[0, ~other], y[0, ~other])
        assert (x[0, other] != y[0, other]).any()


MESHES = {
    "batch and heads": (dict(data=2, fsdp=2, tensor=2), 4),
    "batch not divisible": (dict(fsdp=2, tensor=2), 3),
}


@pytest.mark.parametrize("name", MESHES)
def test_each_shard_computes_its_rows_and_heads(name):
    """The same to the bit as without a mesh, and a device gets only its part of the arrays."""
    sizes, batch = MESHES[name]
    mesh = sharding.make_mesh(**sizes)
    arrays = qkv(128, heads=4, key_heads=4, batch=batch)
    ids = jnp.asarray(np.resize(SEGMENT_IDS, (batch, 128)), jnp.int32)
    shapes = set()

    def kernel(q, k, v, ids, causal):
        shapes.add(q.shape)
        return interpreted(q, k, v, ids, causal=causal)

    def on_mesh(q, k, v, ids, causal):
        return shards.on_shards(functools.partial(kernel, causal=causal), q, k, v, ids)

    expected = value_and_gradients(interpreted, arrays, True, ids)
    placed = jax.device_put(arrays, jax.NamedSharding(mesh, jax.P()))
    ours = value_and_gradients(on_mesh, placed, True, ids)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    parts = sharding.num_batch_shards(mesh)
    rows = batch if batch % parts else batch // parts
    assert shapes == {(rows, 128, 4 // sharding.num_tensor_shards(mesh), 16)}


def test_the_axes_are_those_of_the_mesh():
    assert sharding.AXES == (*sharding.BATCH_AXES, shards.HEADS_AXIS)


def lowered(platform: str, q, k, v, mesh_sizes=None, remat=False, **arguments) -> str:
    """Returns the program for the gradient of attention, lowered for a platform."""
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    if mesh_sizes:
        whole = jax.NamedSharding(sharding.make_mesh(**mesh_sizes), jax.P())
        arrays = [array.update(sharding=whole) for array in arrays]

    def total(*arrays):
        return attention(*arrays, **arguments).astype(jnp.float32).sum()

    function = jax.checkpoint(total) if remat else total
    traced = jax.jit(jax.grad(function, (0, 1, 2))).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("mesh", [None, dict(fsdp=2, tensor=2)])
@pytest.mark.parametrize("use", USES)
def test_bfloat16_uses_splash_on_tpus(use, mesh, remat):
    causal, ids = USES[use].values()
    ids = None if ids is None else jnp.resize(ids, (4, 256))
    arrays = qkv(256, key_heads=2, batch=4)
    text = lowered("tpu", *arrays, mesh, remat, causal=causal, segment_ids=ids)
    # the forward pass, dq, and dk with dv; no product has the size of the logits
    assert text.count("tpu_custom_call") == 3
    assert not re.search(r"dot_general.*256x256x", text)


def test_packed_rows_have_no_mask_on_tpus():
    ids = USES["training rows"]["segment_ids"]
    text = lowered("tpu", *qkv(256), causal=True, segment_ids=ids)
    assert "tpu_custom_call" in text and "stablehlo.compare" not in text


def test_splash_works_with_other_settings():
    """Programs may set these, see test_jax_settings.py; conftest.py sets the precision, too."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision("highest"),
    ):
        text = lowered("tpu", *qkv(200), causal=False)
    assert text.count("tpu_custom_call") == 3
    assert "xi64" not in text


def test_other_uses_are_plain():
    """float32, short rows, decode steps and queries of other tokens; and every use on a CPU."""
    q, k, v = qkv(256)
    start = jnp.zeros(3, jnp.int32)
    plain = [
        lowered("tpu", *(x.astype(jnp.float32) for x in (q, k, v)), causal=True),
        lowered("tpu", *(x[:, :64] for x in (q, k, v)), causal=True),
        lowered("tpu", q[:, :1], k, v, causal=True, q_start=start),
        lowered("tpu", q[:, :128], k, v, causal=False),
        lowered("cpu", q, k, v, causal=True),
    ]
    assert not any("custom_call" in text for text in plain)


@pytest.mark.parametrize("capability, has_cudnn", [("7.5", False), ("8.0", True), ("10.3", True)])
def test_cudnn_needs_an_ampere_gpu(capability, has_cudnn, monkeypatch):
    """Older GPUs, such as the T4 of free notebooks, have no kernel."""
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(attention_cuda, "cudnn_attention", lambda q, *_, causal: q)
    monkeypatch.setattr(jax, "devices", lambda platform: [gpu])
    assert attention_cuda._has_cudnn.__wrapped__() is has_cudnn
