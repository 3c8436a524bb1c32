"""Sharding: the device mesh, and the shardings of parameters and batches on it.

The mesh has the axes `data`, `fsdp` and `tensor`. The batch is sharded over `data` and `fsdp`, the
parameters over `fsdp` and `tensor`; `tensor` shards heads, MLP width and vocabulary. The table of
parameters of a model family (families/) has the spec of each parameter. Model code does not name
mesh axes, except for models/shards.py.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from janus_jax.checks import check_count
from janus_jax.families.family import ParameterTable
from janus_jax.models.kv_cache import KVCache

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer, in a path


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh of the first data * fsdp * tensor devices.

    Args:
        data: size of the axis that shards the batch only.
        fsdp: size of the axis that shards the batch and the parameters.
        tensor: size of the axis that shards heads, MLP width and vocabulary; it must divide the
            number of heads of the model.
        devices: the devices to choose from. Default: all devices of JAX's default backend.
    Raises:
        ValueError: if a size is less than 1, the mesh needs more devices than there are, or JAX
            cannot arrange TPUs as such a mesh.
    """
    axes = zip(AXES, (data, fsdp, tensor), strict=True)
    sizes = {name: check_count(f"mesh axis {name}", size) for name, size in axes}
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        shape = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {shape} needs {needed} devices, but there are only {len(devices)}")
    try:
        return jax.make_mesh(
            tuple(sizes.values()),
            AXES,
            axis_types=(AxisType.Auto,) * len(AXES),
            devices=devices[:needed],
        )
    except (AssertionError, NotImplementedError) as error:  # part of a TPU slice of another shape
        shape = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"JAX cannot arrange {needed} {devices[0].device_kind} devices as the mesh {shape}; "
            "choose powers of two, or a slice of this size"
        ) from error


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that a text such as "data=1,fsdp=1,tensor=4" describes.

    Args:
        text: comma-separated AXIS=SIZE, in any order; an axis that is not named has size 1.
        devices: as for make_mesh.
    Raises:
        ValueError: as mesh_sizes and make_mesh.
    """
    return make_mesh(**mesh_sizes(text), devices=devices)


def mesh_sizes(text: str) -> dict[str, int]:
    """Returns the sizes of the axes that a text such as "data=1,tensor=4" names.

    Raises:
        ValueError: if an axis is unknown or repeated, or a size is not an integer of at least 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal():
            raise ValueError(
                "a mesh must be given as data=1,fsdp=1,tensor=1, each axis at most once, "
                f"got {text!r}"
            )
        sizes[name] = check_count(f"mesh axis {name}", int(size))
    return sizes


def fit_spec(mesh: Mesh, spec: P, shape: Sequence[int]) -> P:
    """Returns the spec without mesh axes whose size does not divide the array dimension.

    Such a dimension is not sharded. Only the numbers of heads must be divisible (see check_mesh).
    For all other sizes, models with small or odd dimensions should work rather than fail, and
    sharding does not change the results.

    Raises:
        ValueError: if the spec has more entries than the shape has dimensions.
    """

    def divisible(dimension: int, axes) -> object:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if dimension % math.prod(mesh.shape[name] for name in names) == 0 else None

    if len(spec) > len(shape):
        raise ValueError(
            f"spec {spec} must have no more entries than shape {tuple(shape)} has dimensions"
        )
    return P(*(divisible(size, axes) for size, axes in zip(shape, spec, strict=False)))


def sharding_for(
    mesh: Mesh, parameters: ParameterTable
) -> Callable[[str, Sequence[int]], NamedSharding]:
    """Returns a function (path, shape) -> sharding of that parameter on the mesh.

    A dimension that the mesh axes of its spec do not divide is not sharded; this is logged once for
    the parameters of all layers together.
    """

    def parameter_sharding(path: str, shape: Sequence[int]) -> NamedSharding:
        spec = parameters.find(path).spec
        fitted = fit_spec(mesh, spec, shape)
        for dimension, axes, kept in zip(shape, spec, fitted, strict=False):
            if kept != axes:
                names = (axes,) if isinstance(axes, str) else axes
                size = math.prod(mesh.shape[name] for name in names)
                _log_not_sharded(_NUMBER.sub("*", path), dimension, ", ".join(names), size)
        return NamedSharding(mesh, fitted)

    return parameter_sharding


@functools.cache  # so that the same message is logged once
def _log_not_sharded(path: str, dimension: int, axis: str, size: int) -> None:
    logging.warning(
        "%s is not sharded over the mesh axis %s: its size %d does not divide the dimension of %d",
        path,
        axis,
        size,
        dimension,
    )


def check_devices() -> None:
    """Raises ValueError if JAX finds no device, or none of the requested platform."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if a plugin is missing
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        reason = f" ({reason})" if reason else ""
        requested = jax.config.jax_platforms
        if not requested:
            raise ValueError(f"JAX cannot use any device{reason}") from error
        raise ValueError(
            f"JAX_PLATFORMS={requested} was requested, but JAX found no {requested} device{reason}"
            f"; {_remedy(requested)}unset JAX_PLATFORMS to let JAX choose, or set it to cpu"
        ) from error


def _remedy(platforms: str) -> str:
    """Returns advice to install the extra of janus_jax for the first of the platforms.

    The advice is an empty string for platforms without an extra.
    """
    extras = {"cuda": "[cuda12] or janus_jax[cuda13]", "tpu": "[tpu]"}
    platform = {"gpu": "cuda"}.get(first := platforms.split(",")[0], first)
    return f"install janus_jax{extras[platform]}, " if platform in extras else ""


def with_auto_axes(mesh: Mesh) -> Mesh:
    """Returns a copy of the mesh whose axes all have type Auto.

    jax.make_mesh creates axes of type Explicit by default; here XLA chooses the shardings of
    intermediate values.

    Raises:
        ValueError: if `mesh` is not a Mesh with the axes data, fsdp and tensor.
    """
    if not isinstance(mesh, Mesh) or set(mesh.axis_names) != set(AXES):
        got = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else repr(mesh)
        raise ValueError(f"a mesh must have the axes {', '.join(AXES)}, got {got}")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(mesh: Mesh, heads: Mapping[str, int]) -> None:
    """Raises ValueError if the size of the axis `tensor` does not divide a number of heads.

    heads: numbers of heads by name, see families.family.Sizes.
    """
    check_heads(mesh.shape["tensor"], heads)


def check_heads(tensor: int, heads: Mapping[str, int]) -> None:
    """Raises ValueError if `tensor`, the size of that axis, does not divide a number of heads."""
    for name, count in heads.items():
        if count % tensor:
            raise ValueError(f"mesh axis tensor={tensor} must divide the {count} {name}")


def num_batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of shards of a batch: data * fsdp, or 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)


def num_tensor_shards(mesh: Mesh | None) -> int:
    """Returns the number of shards of the attention heads, or 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["tensor"]


def batch_sharding(mesh: Mesh, batch: int | None = None) -> NamedSharding:
    """Returns the sharding of an array whose first axis is the batch.

    The array is replicated if `batch`, the size of that axis, is given and not divisible by the
    number of shards.
    """
    replicated = batch is not None and batch % num_batch_shards(mesh)
    return NamedSharding(mesh, P() if replicated else P(BATCH_AXES))


def put_batch(arrays, mesh: Mesh | None):
    """Puts a pytree of arrays, whose first axis is the batch, on the devices."""
    if mesh is None:
        return jax.device_put(arrays)
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.shape[0])), arrays)


def constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    """Constrains the sharding of x, inside jit; drops mesh axes that do not divide it.

    Returns x itself without a mesh.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(mesh, spec, x.shape)))


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains x to be sharded over the batch, its first axis, inside jit."""
    return constrain(x, mesh, P(BATCH_AXES))


def constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Constrains the cache to be sharded over the batch and the heads, inside jit."""
    shard = functools.partial(constrain, mesh=mesh, spec=P(BATCH_AXES, None, "tensor", None))
    return KVCache(tuple(map(shard, cache.keys)), tuple(map(shard, cache.values)), cache.lengths)


def replicate(tree, mesh: Mesh | None):
    """Constrains a pytree to be replicated, inside jit, so that every process can read it."""
    return jax.tree.map(lambda x: constrain(x, mesh, P()), tree)
