"""Frozen parameters of layers that run in a loop: one array for all layers, stacked when loaded.

A step that stacks parameters copies them. It has to copy trainable parameters in any case, to cast
them, but not frozen ones.
"""

import collections
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Groups = dict[str, list[str]]  # path of a stacked parameter -> its paths in the layers, in order


def same_in_all_layers(trained: Iterable[str], frozen: Iterable[str], stack: str) -> bool:
    """Returns whether all layers of a stack have the same trainable parameters.

    If only some layers are trained, a loop would compute the gradients of all of them.

    trained, frozen: parameter paths. stack: path of a list of layers, see Family.
    """
    layer = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.+)")
    numbers = {match[1] for match in map(layer.match, (*trained, *frozen)) if match}
    counts = collections.Counter(match[2] for match in map(layer.match, trained) if match)
    return all(count == len(numbers) for count in counts.values())


def stack_size(shapes: Mapping[str, jax.ShapeDtypeStruct], stack: str) -> int:
    """Returns the number of parameters in a stack."""
    return sum(leaf.size for path, leaf in shapes.items() if path.startswith(f"{stack}."))


def stacked_groups(paths: Iterable[str], stacks: Iterable[str]) -> Groups:
    """Groups the paths of the layers of each stack; the stacked paths have * for the number.

    stacks: paths of the lists of layers, see Family.
    """
    groups: dict[str, dict[int, str]] = {}
    for stack in stacks:
        layer = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.+)")
        for path in filter(layer.match, paths):
            number, name = layer.match(path).groups()
            groups.setdefault(f"{stack}.*.{name}", {})[int(number)] = path
    return {name: [found[i] for i in sorted(found)] for name, found in groups.items()}


def stack_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct], groups: Groups
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the parameters after stack_params, with shardings."""
    stacked = {}
    for name, paths in groups.items():
        leaf = shapes[paths[0]]
        spec = PartitionSpec(None, *leaf.sharding.spec)
        sharding = NamedSharding(leaf.sharding.mesh, spec)
        shape = len(paths), *leaf.shape
        stacked[name] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    return _others(shapes, groups) | stacked


def stack_params(
    params: dict[str, jax.Array], shapes: Mapping[str, jax.ShapeDtypeStruct], groups: Groups
) -> dict[str, jax.Array]:
    """Stacks parameters, and removes them from `params` so that one group at a time is copied.

    shapes: those of the result, see stack_shapes.
    """
    stacked = {}
    for name, paths in groups.items():
        layers = [params.pop(path) for path in paths]
        stacked[name] = jax.jit(jnp.stack, out_shardings=shapes[name].sharding)(layers)
    return params | stacked


def unstack_params(params: Mapping[str, jax.Array], groups: Groups) -> dict[str, jax.Array]:
    """Returns the parameters by their paths in the layers.

    Inside of jit no array is copied: XLA recognizes that layers.run_layers stacks them again.
    """
    layers = {
        path: jax.lax.index_in_dim(params[name], i, keepdims=False)
        for name, paths in groups.items()
        if name in params
        for i, path in enumerate(paths)
    }
    return {name: array for name, array in params.items() if name not in groups} | layers


def _others(shapes: Mapping, groups: Groups) -> dict:
    """Returns what is in no group."""
    grouped = {path for paths in groups.values() for path in paths}
    return {path: leaf for path, leaf in shapes.items() if path not in grouped}
