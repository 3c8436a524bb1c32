"""Opens the parameters of a checkpoint folder on the host, in their stored dtypes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from janus_jax.families.family import Shape
from janus_jax.interop import orbax
from janus_jax.interop.load import (
    Folder,
    check_stored,
    open_adapter,
    param_shapes,
    plan_folder,
    table_for,
)
from janus_jax.interop.readers import read_safetensors
from janus_jax.interop.rules import skip_reasons


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """Parameters of a folder in their stored dtypes.

    metadata: dtype and shape by path. read: returns the values of a path.
    unused: tensors that the model does not use, by PyTorch name. skipped: the reason for each.
    """

    metadata: Mapping[str, tuple[np.dtype, Shape]]
    read: Callable[[str], np.ndarray]
    unused: Mapping[str, np.ndarray]
    skipped: Mapping[str, str]


def stored_params(folder: Folder) -> StoredParams:
    """Opens a folder's parameters on the host in their stored dtypes.

    Values of a PyTorch folder are views of its memory-mapped files. For an Orbax folder, the first
    read loads all parameters into host memory. A LoRA adapter is merged in float32, and the sum is
    rounded to the parameter's dtype.
    """
    stored = _stored_orbax(folder) if folder.is_orbax else _stored_torch(folder)
    adapter = open_adapter(folder)
    if adapter is None:
        return stored

    def read(path: str) -> np.ndarray:
        return adapter.merged(path, stored.read(path)).astype(stored.metadata[path][0], copy=False)

    return dataclasses.replace(stored, read=read)


def _stored_torch(folder: Folder) -> StoredParams:
    source, plan = plan_folder(folder)
    steps = {path: (step, i) for step in plan.steps for i, path in enumerate(step.paths)}

    def read(path: str) -> np.ndarray:
        step, i = steps[path]
        return step.op.from_torch(source.read(step.torch))[i]

    shapes = param_shapes(folder.cfg)
    metadata = {path: (source.dtype(step.torch), shapes[path]) for path, (step, _) in steps.items()}
    unused = {name: source.read(name) for name in plan.skipped}
    return StoredParams(metadata, read, unused, plan.skipped)


def _stored_orbax(folder: Folder) -> StoredParams:
    stored = check_stored(folder)
    metadata = {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in stored.items()}
    path = folder.path / orbax.UNUSED
    tensors, _ = read_safetensors(path) if path.is_file() else ({}, [])
    unused = {name: tensor.read() for name, tensor in tensors.items()}
    table = table_for(folder.layout, folder.cfg)
    skipped = {name: " ".join(skip_reasons(table, name)) for name in unused}
    arrays = functools.cache(lambda: dict(orbax.restore_numpy(folder.path, stored)))
    return StoredParams(metadata, lambda path: arrays()[path], unused, skipped)
