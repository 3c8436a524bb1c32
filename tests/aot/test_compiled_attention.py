"""The attention kernels in programs that are compiled for devices that need not be present.

The tests of a platform whose compiler is not installed are skipped.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from janus_jax.aot.topology import described_devices
from janus_jax.devices import known_devices
from janus_jax.models.attention import attention
from janus_jax.sharding import make_mesh

DEVICES = {"tpu": "v5e", "cuda": "h100"}
COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}
KERNELS = {
    "tpu": ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"),
    "cuda": ("__cudnn$fmha", "Backward"),
}


@pytest.fixture(params=DEVICES)
def platform(request) -> str:
    """Returns a platform whose compiler is installed."""
    if not importlib.util.find_spec(COMPILERS[request.param]):
        pytest.skip(f"needs {COMPILERS[request.param]}")
    return request.param


def compiled_gradient(
    platform: str, head_dim: int, length: int, mesh_sizes: dict, causal: bool
) -> str:
    """Returns the text of a program for the gradient of attention, with rematerialization."""
    devices = described_devices(known_devices()[DEVICES[platform]], 4)
    mesh = make_mesh(**mesh_sizes, devices=devices)
    spec = jax.P(("data", "fsdp"), None, "tensor")
    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.bfloat16, sharding=sharding)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=rows)

    @jax.checkpoint
    def total(q, k, v, ids):
        out = attention(q, k, v, causal=causal, segment_ids=ids if causal else None)
        return jnp.sin(out.astype(jnp.float32)).sum()

    return jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x, ids).compile().as_text()


def logits(text: str, length: int) -> set[str]:
    """Returns the types of all arrays whose last two axes have the size of the row."""
    return {kind for kind, _ in re.findall(rf"\b(\w+)\[([\d,]*,)?{length},{length}\]", text)}


@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=2, tensor=2)])
def test_packed_rows(platform, mesh):
    """One device, and four: a kernel works on its rows and heads without communication."""
    text = compiled_gradient(platform, 128, 1024, mesh, causal=True)
    assert all(kernel in text for kernel in KERNELS[platform])
    # only JAX's interface to cuDNN needs a mask; on TPUs, no array has this size
    assert not logits(text, 1024) & ({"f32"} if platform == "cuda" else {"f32", "bf16", "pred"})
    assert not re.search(r"all-gather|all-to-all|collective-permute|bf16\S* all-reduce", text)


def test_image_encoder(platform):
    """The sizes of SigLIP: 576 patches, 64 elements a head. Programs may set the precision."""
    with jax.default_matmul_precision("highest"):
        text = compiled_gradient(platform, 64, 576, {}, causal=False)
    assert all(kernel in text for kernel in KERNELS[platform])
    assert not logits(text, 576) | logits(text, 640)
