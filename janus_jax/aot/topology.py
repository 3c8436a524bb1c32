"""Devices that programs can be compiled for without having them.

JAX's compilers for TPU (libtpu) and CUDA (the jax-cuda plugins) describe such devices; programs for
them can be compiled and inspected, but not run.
"""

import functools
import math
import os

import jax
from jax.experimental import topologies

from janus_jax.devices import DeviceFacts, known_devices

GPUS_PER_HOST = 8
# Limits that all CUDA devices of compute capability 8.0 to 9.0 have.
_GPU_LIMITS = dict(
    threads_per_block_limit=1024,
    threads_per_warp=32,
    shared_memory_per_block=49152,
    block_dim_limit_x=2**31 - 1,
    block_dim_limit_y=65535,
    block_dim_limit_z=65535,
    registers_per_core_limit=65536,
    registers_per_block_limit=65536,
)
_TPU_ENVIRONMENT = {  # read by libtpu when it is loaded
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server for the type of this machine
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may compile at the same time
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any type; without one, libtpu asks a server
}
_EXTRAS = {"tpu": "compile-tpu", "cuda": "compile-cuda"}


def device_names() -> list[str]:
    """Returns the names of the devices that programs can be compiled for."""
    return [name for name, facts in known_devices().items() if facts.topologies or facts.gpu]


def smallest_topology(facts: DeviceFacts, count: int) -> str:
    """Returns the smallest TPU slice with at least `count` devices.

    Raises:
        ValueError: there is no such slice in the data file of the device.
    """
    for topology in facts.topologies:
        if num_devices(facts, topology) >= count:
            return topology
    largest = facts.topologies[-1]
    raise ValueError(
        f"the mesh needs {count} devices, but the largest slice of {facts.name} has "
        f"{num_devices(facts, largest)} ({largest})"
    )


def num_devices(facts: DeviceFacts, topology: str) -> int:
    """Returns the number of devices of a TPU slice: chips, or TensorCores of tpu7x.

    Raises:
        ValueError: the topology is not one of the slices in the data file of the device.
    """
    if topology not in facts.topologies:
        slices = ", ".join(facts.topologies) or "none"
        raise ValueError(f"the topology of {facts.name} must be one of {slices}, got {topology!r}")
    return math.prod(map(int, topology.split("x"))) * facts.devices_per_chip


@functools.cache
def described_devices(facts: DeviceFacts, count: int, topology: str = "") -> list[jax.Device]:
    """Returns devices to compile for, which JAX only describes.

    count: number of devices. topology: the TPU slice that they are the first devices of. Default:
        the smallest slice that has as many.

    Raises:
        ValueError: the compiler for the platform is not installed, or the topology is not one of
            the slices in the data file of the device, or has too few devices.
    """
    if facts.platform == "cuda":
        if topology:
            raise ValueError(f"--topology is for TPUs, got {facts.name}; remove it")
        hosts, rest = divmod(count, GPUS_PER_HOST)
        if hosts and rest:
            raise ValueError(
                f"more than {GPUS_PER_HOST} GPUs must be a multiple of {GPUS_PER_HOST}, the number "
                f"of a host, got {count}"
            )
        hosts = max(1, hosts)
        # the sizes are slices, hosts of a slice and GPUs of a host
        settings = dict(
            target_config=gpu_description(facts), topology=f"1x{hosts}x{count // hosts}"
        )
        return list(_describe(facts, facts.name, **settings))
    topology = topology or smallest_topology(facts, count)
    if num_devices(facts, topology) < count:
        raise ValueError(f"the mesh needs {count} devices, but {facts.name}:{topology} has fewer")
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return list(_describe(facts, f"{facts.name}:{topology}"))[:count]


def _describe(facts: DeviceFacts, name: str, **settings):
    try:
        return topologies.get_topology_desc(name, facts.platform, **settings).devices
    except (RuntimeError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot compile for {name}; if the compiler is missing, run pip install -e "
            f"'.[{_EXTRAS[facts.platform]}]' ({reason})"
        ) from error


def gpu_description(facts: DeviceFacts) -> str:
    """Returns a text proto, xla.gpu.GpuTargetConfigProto, that describes a GPU."""
    major, minor = facts.gpu["compute_capability"]
    sizes = {name: value for name, value in facts.gpu.items() if name != "compute_capability"}
    sizes |= _GPU_LIMITS | dict(
        memory_bandwidth=int(facts.memory_bytes_per_s), device_memory_size=facts.memory_bytes
    )
    fields = " ".join(f"{name}: {value}" for name, value in sizes.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return "\n".join(
        (
            f"gpu_device_info {{ {fields} {capability} }}",
            "runtime_version { major: 12 minor: 9 patch: 0 }",
            "dnn_version_info { major: 9 minor: 10 }",
            'platform_name: "CUDA"',
            f'device_description_str: "{facts.device_kinds[0]}"',
        )
    )
