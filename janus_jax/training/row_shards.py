"""Applies a head to rows on several devices: each device processes its own rows.

The loss of a head is a loop over chunks of positions. Left to itself, XLA gathers the parameters of
the head in every iteration, and adds up their gradients over the devices in every iteration. Here,
the parameters are gathered once before the loop, and the gradients are added up once behind it.
"""

import functools
import operator
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from janus_jax.families.registry import family_of
from janus_jax.interop.load import leaves_by_path, merge_params
from janus_jax.sharding import BATCH_AXES, num_batch_shards, sharding_for


def on_row_shards(
    function: Callable[..., jax.Array],
    model: nnx.Module,
    path: str,
    dtype,
    mesh: Mesh | None,
    *rows: jax.Array,
) -> jax.Array:
    """Returns function(head, *rows), computed on each device for its rows.

    Args:
        function: (head, arrays [B, ...]) -> array [B, ...], where no row depends on another.
        model: the model. path: that of the head in the model.
        dtype: the dtype to which the head rounds its sharded parameters before it uses them.
        mesh: the devices that the rows are sharded over.
        rows: arrays [B, ...].
    """
    head = operator.attrgetter(path)(model)
    if num_batch_shards(mesh) == 1:
        return function(head, *rows)
    graph, state = nnx.split(head)
    params = dict(leaves_by_path(state))
    sharding = sharding_for(mesh, family_of(model.cfg).parameter_table)
    specs = {
        name: _batch_axes(sharding(f"{path}.{name}", leaf.shape).spec)
        for name, leaf in params.items()
    }

    def local(params: dict[str, jax.Array], *rows: jax.Array) -> jax.Array:
        whole = {name: _gather(leaf, specs[name], dtype) for name, leaf in params.items()}
        return function(merge_params(graph, state, whole.__getitem__), *rows)

    by_rows = P(BATCH_AXES)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, *(by_rows for _ in rows)),
        out_specs=by_rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,  # its rules would add up the gradients within the loop
    )(params, *rows)


def _batch_axes(spec: P) -> P:
    """Returns the spec without the axes that do not shard the batch."""
    return P(*(axis if axis in BATCH_AXES else None for axis in spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, spec: P, dtype) -> jax.Array:
    """Gathers an array within a shard_map.

    The gradient is summed over the devices and scattered in the dtype of x, not in `dtype`.

    spec: the mesh axis, or None, of each dimension. If there is none, x is returned.
    dtype: x is rounded to it before it is sent; bfloat16 halves the bytes of a float32 array.
    """
    sharded = [(i, axis) for i, axis in enumerate(spec) if axis]
    whole = x.astype(dtype) if sharded else x
    for i, axis in sharded:
        whole = jax.lax.all_gather(whole, axis, axis=i, tiled=True)
    return whole.astype(x.dtype)


def _gather_forward(x: jax.Array, spec: P, dtype):
    return _gather(x, spec, dtype), None


def _gather_backward(spec: P, dtype, _, gradient: jax.Array):
    for i, axis in enumerate(spec):
        if axis:
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=i, tiled=True)
    return (gradient,)


_gather.defvjp(_gather_forward, _gather_backward)
