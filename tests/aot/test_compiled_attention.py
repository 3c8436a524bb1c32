"""The attention kernels in programs that are compiled for devices that need not be present.

The tests of a platform whose compiler is not installed are skipped.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from compilers import DEVICES, needs_cuda

from janus_jax.aot.topology import described_devices
from janus_jax.devices import known_devices
from janus_jax.models.attention import attention
from janus_jax.sharding import make_mesh

KERNELS = {
    "v5e": ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"),
    "h100": ("__cudnn$fmha", "Backward"),
}


def compiled_gradient(
    device: str,
    head_dim: int,
    length: int,
    mesh_sizes: dict,
    causal: bool,
    dtype: jnp.dtype = jnp.bfloat16,
) -> str:
    """Returns the text of a program for the gradient of attention, with rematerialization."""
    devices = described_devices(known_devices()[device], 4)
    mesh = make_mesh(**mesh_sizes, devices=devices)
    spec = jax.P(("data", "fsdp"), None, "tensor")
    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((2, length, 4, head_dim), dtype, sharding=sharding)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=2, tensor=2)])
def test_packed_rows(device, mesh):
    """One device, and four: a kernel works on its rows and heads without communication."""
    text = compiled_gradient(device, 128, 1024, mesh, causal=True)
    assert all(kernel in text for kernel in KERNELS[device])
    # only JAX's interface to cuDNN needs a mask; on TPUs, no array has this size
    assert not logits(text, 1024) & ({"f32"} if device == "h100" else {"f32", "bf16", "pred"})
    assert not re.search(r"all-gather|all-to-all|collective-permute|bf16\S* all-reduce", text)


@pytest.mark.parametrize("device", DEVICES)
def test_image_encoder(device):
    """The sizes of SigLIP: 576 patches, 64 elements a head. Programs may set the precision."""
    with jax.default_matmul_precision("highest"):
        text = compiled_gradient(device, 64, 576, {}, causal=False)
    assert all(kernel in text for kernel in KERNELS[device])
    assert not logits(text, 576) | logits(text, 640)


@pytest.mark.parametrize(
    ("head_dim", "length", "dtype"),
    [
        (64, 577, jnp.bfloat16),
        (12, 576, jnp.bfloat16),
        (136, 576, jnp.bfloat16),
        (64, 64, jnp.bfloat16),
        (64, 576, jnp.float32),
    ],
)
@needs_cuda
def test_what_cudnn_does_not_support_is_plain(head_dim, length, dtype):
    text = compiled_gradient("h100", head_dim, length, {}, causal=False, dtype=dtype)
    assert "__cudnn$fmha" not in text
