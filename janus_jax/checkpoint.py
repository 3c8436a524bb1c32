"""Our own checkpoint folder: parameters in Orbax beside the files that make it complete.

FOLDER/params/               the parameter tree (Orbax), each tensor in its own dtype
FOLDER/unused.safetensors    tensors of the source that the model does not use, for exporting
FOLDER/config.json, ...      config, tokenizer and processor files as the source has them
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from janus_jax.interop.files import CONFIG, new_folder, write_safetensors_file
from janus_jax.interop.processor_files import copy_files
from janus_jax.processing.json_files import write_json

PARAMS = "params"
UNUSED = "unused.safetensors"
GROUP_BYTES = 2.5e8  # read at a time


@contextlib.contextmanager
def _told_as(kind: type[Exception], what: str) -> Iterator[None]:
    """Orbax and its storage raise many kinds of exception, of many lines; here they are one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # no fault of the folder's
        text = str(error).strip() or type(error).__name__
        raise kind(f"{what}: {text.splitlines()[0]}") from error


def is_orbax(folder: Path | str) -> bool:
    """Whether a folder is one that `save` wrote."""
    return (Path(folder) / PARAMS / "_METADATA").is_file()


def save(
    folder: Path | str,
    params: Mapping[str, jax.Array | np.ndarray],
    *,
    config: Mapping,
    files_from: Path | str,
    unused: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder beside and renames it when it is complete.

    Orbax takes a copy of host arrays before it writes, so memory for one copy of `params` is used.

    Args:
      params: arrays by path ('und_encoder.pos_embed'), stored in their own dtype.
      config: contents of config.json, in either PyTorch layout.
      files_from: a checkpoint folder whose tokenizer and processor files are copied.
      unused: arrays by PyTorch name that an export gives back.

    Raises:
      FileExistsError: the folder exists and `overwrite` is not set.
      OSError: it could not be written; nothing is left behind.
    """
    unused = unused or {}
    size = sum(array.nbytes for arrays in (params, unused) for array in arrays.values())
    with new_folder(Path(folder), overwrite, size) as beside:
        copy_files(Path(files_from), beside)
        write_json(beside / CONFIG, config)
        kinds = {name: (array.dtype, array.shape) for name, array in unused.items()}
        write_safetensors_file(beside / UNUSED, kinds, unused.__getitem__)
        tree = traverse_util.unflatten_dict(dict(params), sep=".")
        # in a thread, for which an interrupt waits: Orbax's own threads would write on otherwise,
        # into a folder that is deleted
        with _told_as(OSError, f"{folder} could not be written"), ThreadPoolExecutor(1) as pool:
            pool.submit(_write, beside / PARAMS, tree).result()


def _write(folder: Path, tree: Mapping) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def _damaged(folder: Path | str) -> contextlib.AbstractContextManager[None]:
    return _told_as(ValueError, f"{Path(folder) / PARAMS} is damaged")


def stored_params(folder: Path | str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and stored dtype of every parameter by path; reads no values.

    Raises:
      ValueError: the folder is damaged.
    """
    with _damaged(folder), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(Path(folder).resolve() / PARAMS).item_metadata
        if metadata is None:
            raise ValueError("its list of parameters cannot be read")
    flat = traverse_util.flatten_dict(metadata.tree, sep=".")
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}


def restore(
    folder: Path | str,
    params: Mapping[str, jax.ShapeDtypeStruct],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """Reads parameters, each straight to its own sharding, and gives it its dtype there.

    params: shape, dtype and sharding wanted, by path; others that are stored are not read. They are
    read in groups of GROUP_BYTES, or of one parameter that is larger; no more than that is in
    memory beside them.
    progress: called with the bytes read so far and in all.

    Raises:
      ValueError: the folder is damaged.
    """
    stored, restored = stored_params(folder), {}
    stored = {path: leaf for path, leaf in stored.items() if path in params}
    done, total = 0, sum(map(_size, stored.values()))
    with _damaged(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for group in _groups(stored):
            wanted = {path: params[path].update(dtype=stored[path].dtype) for path in group}
            tree = traverse_util.unflatten_dict(wanted, sep=".")
            how = ocp.args.PyTreeRestore(
                item=tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=True,
            )
            read = reader.restore(Path(folder).resolve() / PARAMS, args=how)
            for path, array in traverse_util.flatten_dict(read, sep=".").items():
                # waited for, or the arrays of many groups would be there at once
                restored[path] = jax.block_until_ready(array.astype(params[path].dtype))
            done += sum(_size(stored[path]) for path in group)
            if progress is not None:
                progress(done, total)
    return restored


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _groups(stored: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    group, held = [], 0
    for path, leaf in stored.items():
        size = _size(leaf)
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    if group:
        yield group


def restore_numpy(folder: Path | str) -> dict[str, np.ndarray]:
    """Reads all parameters into host memory, in the dtypes they are stored in."""
    paths = dict.fromkeys(stored_params(folder), ocp.RestoreArgs(restore_type=np.ndarray))
    with _damaged(folder), ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            Path(folder).resolve() / PARAMS,
            restore_args=traverse_util.unflatten_dict(paths, sep="."),
        )
    return traverse_util.flatten_dict(restored, sep=".")
