"""Runs a function once per shard of the batch and of the heads.

XLA cannot partition a kernel. A function with a kernel in it therefore runs in a `jax.shard_map` if
its arrays are on several devices. The mesh is that of the arrays; this file is the only one in
models/ that names a mesh axis.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

HEADS_AXIS = "tensor"  # the mesh axis that shards the heads; all other axes shard the batch


def on_shards(
    function: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Returns function(q, k, v, segment_ids), computed on each device for its rows and heads.

    If mesh axes do not divide the batch or the heads, all devices along them compute the same.
    Without a mesh, and inside of another shard_map, the function is only called.

    Args:
        function: computes each row and each group of heads independently of the others.
        q: float[B, T, N, H]. k, v: float[B, S, K, H], where N is a multiple of K.
        segment_ids: int32[B, T] or None.
    Returns:
        float[B, T, N, H].
    """
    mesh = jax.typeof(q).sharding.mesh
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return function(q, k, v, segment_ids)
    batch = _dividing(mesh, [name for name in mesh.axis_names if name != HEADS_AXIS], len(q))
    heads = _dividing(mesh, [name for name in mesh.axis_names if name == HEADS_AXIS], k.shape[2])
    spec = P(batch, None, heads, None)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(spec, spec, spec, P(batch)),
        out_specs=spec,
        check_vma=False,  # the outputs of Pallas kernels do not say over which axes they vary
    )(q, k, v, segment_ids)


def _dividing(mesh: AbstractMesh, axes: list[str], size: int) -> tuple[str, ...]:
    """Returns the axes, or none if the number of their devices does not divide the size."""
    return tuple(axes) if size % math.prod(mesh.shape[name] for name in axes) == 0 else ()
