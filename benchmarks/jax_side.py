"""What the JAX sides of the benchmarks share: random models, bandwidth, memory and profiles."""

import collections
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import repeated
from janus_jax.interop.load import abstract, build_model
from janus_jax.models.janus import Janus, JanusConfig

STD = 0.02  # standard deviation of random weights; scales of norms are 1
LARGE = 2**22  # elements; smaller arrays are made on the host, without a compilation
COPY_BYTES = {"cpu": 2**26}  # size of the copied array by platform; elsewhere LARGE_COPY
LARGE_COPY = 2**30
COPIES = 20
TOP_KERNELS = 25


def device_name() -> str:
    """Returns the kind of the first device, such as "NVIDIA H100 80GB HBM3" or "cpu"."""
    return jax.devices()[0].device_kind


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _normal(seed: jax.Array, shape: tuple, dtype, sharding=None) -> jax.Array:
    """Returns random weights. RBG compiles in a fraction of the time that threefry takes."""
    key = jax.random.wrap_key_data(jnp.full(4, seed, jnp.uint32), impl="rbg")
    values = (STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return values if sharding is None else jax.lax.with_sharding_constraint(values, sharding)


def random_array(seed: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a random array of a shape, dtype and sharding; ones if it has one dimension.

    Large arrays are made on the devices, with one program for each of their few shapes.
    """
    if leaf.size >= LARGE:
        return _normal(np.uint32(seed), leaf.shape, jnp.dtype(leaf.dtype), leaf.sharding)
    values = np.ones(leaf.shape, np.float32)
    if len(leaf.shape) > 1:
        values = STD * np.random.default_rng(seed).standard_normal(leaf.shape, np.float32)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)


def random_model(cfg: JanusConfig) -> Janus:
    """Returns a model with random weights on the default device."""
    leaves = nnx.to_flat_state(abstract(cfg)[1])
    params = {
        ".".join(map(str, keys)): random_array(number, leaf.get_value())
        for number, (keys, leaf) in enumerate(leaves)
    }
    return build_model(cfg, jax.block_until_ready(params))


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copy(source: jax.Array, target: jax.Array) -> jax.Array:
    """Copies `source` into the memory of `target`, so that no further memory is needed."""
    return jnp.copy(source)


def copy_bandwidth() -> float:
    """Measures the bandwidth of copies on the device, in bytes/s.

    Counts the bytes read and the bytes written. Returns the median of five runs of COPIES copies.
    """
    size = COPY_BYTES.get(jax.default_backend(), LARGE_COPY)
    source = jnp.ones(size // 4, jnp.float32)
    target = jnp.zeros_like(source)

    def copies() -> None:
        nonlocal target
        for _ in range(COPIES):
            target = _copy(source, target)
        target.block_until_ready()

    copies()
    return 2 * size * COPIES / float(np.median(repeated(copies, 5)))


def peak_memory() -> dict[str, float]:
    """Returns peak_gb, the peak memory of the first device so far; empty where JAX has none."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}


@contextlib.contextmanager
def _trace(folder: Path) -> Iterator[None]:
    """Records a profile without Python calls, which would make the file large."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def profile(function: Callable[[], object], steps: int, folder: str | None) -> dict:
    """Profiles a call; the function must wait for its results.

    steps: number of steps of the call, by which times and counts are divided.
    folder: where the profile is kept, for XProf or Perfetto. None: it is deleted.
    Returns what `kernels` does, and wall_ms, the milliseconds of a step.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        with _trace(Path(folder)):
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
        found = kernels(Path(folder), steps)
    return dict(wall_ms=round(1e3 * seconds / steps, 4)) | found


def kernels(folder: Path, steps: int) -> dict:
    """Returns what the device did in the newest profile in a folder.

    busy_ms: milliseconds per step that kernels and copies take, all streams added up.
    kernels: number of kernels and copies per step.
    top: the kinds that take the longest: [name, ms per step, number per step].
    Without a GPU or TPU the profile has no kernels.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    total, count = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for event in _device_events(plane):
            total[event.name] += event.duration_ns
            count[event.name] += 1
    top = [
        [name, round(time_ns / 1e6 / steps, 5), round(count[name] / steps, 2)]
        for name, time_ns in total.most_common(TOP_KERNELS)
    ]
    busy = round(total.total() / 1e6 / steps, 4)
    return dict(busy_ms=busy, kernels=round(count.total() / steps, 1), top=top)


def _device_events(plane) -> Iterator:
    """Yields what a device did: the events of a GPU's streams, or the operations of a TPU."""
    if not plane.name.startswith("/device:"):
        return
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or [line for line in lines if line.name == "XLA Ops"]:
        yield from line.events
