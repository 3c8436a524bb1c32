"""The attention kernels in programs that are compiled for devices that need not be present.

Needs libtpu or JAX's CUDA libraries; the tests of a platform whose compiler is missing are skipped.
"""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from janus_jax.models.attention import attention
from janus_jax.sharding import make_mesh

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query the metadata of the machine
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there may be no driver
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KERNELS = {
    "tpu": ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"),
    "cuda": ("__cudnn$fmha", "Backward"),
}


@functools.cache
def described_devices(platform: str) -> list:
    """Returns four devices to compile for: of a v5e slice, or H100."""
    if platform == "tpu":
        pytest.importorskip("libtpu")
        return topologies.get_topology_desc("v5e:2x2", "tpu").devices
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("JAX's CUDA libraries are not installed")
    card = dict(target_config=H100, topology="1x1x4")
    return topologies.get_topology_desc("h100", "cuda", **card).devices


def compiled_gradient(platform: str, head_dim: int, length: int, mesh_sizes: dict, **arguments):
    """Returns the text of a program for the gradient of attention, with rematerialization."""
    mesh = make_mesh(**mesh_sizes, devices=described_devices(platform))
    spec = jax.P(("data", "fsdp"), None, "tensor")
    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.bfloat16, sharding=sharding)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=rows)

    @jax.checkpoint
    def total(q, k, v, ids):
        ids = ids if arguments["causal"] else None
        return jnp.sin(attention(q, k, v, segment_ids=ids, **arguments).astype(jnp.float32)).sum()

    return jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x, ids).compile().as_text()


def logits(text: str, length: int) -> set[str]:
    """Returns the types of all arrays whose last two axes have the size of the row."""
    return {kind for kind, _ in re.findall(rf"\b(\w+)\[([\d,]*,)?{length},{length}\]", text)}


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=2, tensor=2)])
def test_packed_rows(platform, mesh):
    """One device, and four: a kernel works on its rows and heads without communication."""
    text = compiled_gradient(platform, 128, 1024, mesh, causal=True)
    assert all(kernel in text for kernel in KERNELS[platform])
    # only JAX's interface to cuDNN needs a mask; on TPUs, no array has this size
    assert not logits(text, 1024) & ({"f32"} if platform == "cuda" else {"f32", "bf16", "pred"})
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce\(.*bf16", text)


@pytest.mark.parametrize("platform", KERNELS)
def test_image_encoder(platform):
    """The sizes of SigLIP: 576 patches, 64 elements a head."""
    text = compiled_gradient(platform, 64, 576, {}, causal=False)
    assert all(kernel in text for kernel in KERNELS[platform])
    assert not logits(text, 576) | logits(text, 640)
