"""Reads and writes Orbax checkpoint folders, which also hold the model's other files.

FOLDER/params/               the parameter tree (Orbax), each tensor in its own dtype
FOLDER/unused.safetensors    source tensors that the model does not use, kept for exporting
FOLDER/config.json, ...      config, tokenizer and processor files, copied from the source
"""

import contextlib
import functools
import math
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from janus_jax import orbax_errors
from janus_jax.interop.files import (
    CONFIG,
    METADATA,
    PARAMS,
    Report,
    write_safetensors_file,
)
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.processor_files import copy_files
from janus_jax.paths import MAX_JSON_BYTES, bounded_size, write_json

UNUSED = "unused.safetensors"
UNREADABLE = "a parameter cannot be read"
GROUP_BYTES = 2.5e8  # bytes read at a time
_REPORT_SECONDS = 0.5


def save(
    folder: Path | str,
    params: Mapping[str, jax.Array | np.ndarray],
    *,
    config: Mapping,
    files_from: Path | str,
    unused: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> None:
    """Writes an Orbax checkpoint folder atomically.

    Orbax copies host arrays before it writes them, so this uses memory for one copy of `params`.

    Args:
      folder: the folder to write.
      params: arrays by path ('und_encoder.pos_embed'), stored in their own dtype.
      config: contents of config.json, in either PyTorch layout.
      files_from: a checkpoint folder whose tokenizer and processor files are copied.
      unused: arrays by PyTorch name that an export writes again.
      overwrite: whether an existing checkpoint folder is replaced.
      progress: called with the bytes written to the disk and the total bytes of the arrays. Orbax
        compresses the arrays, so the first number may stay below the second.

    Raises:
      FileExistsError: the folder exists and `overwrite` is not set.
      OSError: the folder could not be written; nothing is left behind.
      ValueError: as `new_folder`.
    """
    unused = unused or {}
    size = sum(array.nbytes for arrays in (params, unused) for array in arrays.values())
    with new_folder(Path(folder), overwrite, size) as staging:
        copy_files(Path(files_from), staging)
        write_json(staging / CONFIG, config)
        metadata = {name: (array.dtype, array.shape) for name, array in unused.items()}
        write_safetensors_file(staging / UNUSED, metadata, unused.__getitem__)
        tree = traverse_util.unflatten_dict(dict(params), sep=".")
        # An interrupt waits for this thread. Otherwise Orbax's own threads would continue to write
        # into a folder that is being deleted.
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(_write, folder, staging / PARAMS, tree)
            if progress is not None:
                _report_growth(future, staging, size, progress)
            future.result()


def _report_growth(future: Future, folder: Path, size: int, progress: Report) -> None:
    """Reports the bytes in a folder until `future`, which writes it, is done."""
    written = 0
    while wait([future], _REPORT_SECONDS).not_done:
        written = min(max(written, _bytes_in(folder)), size)
        progress(written, size)


def _bytes_in(folder: Path) -> int:
    """Returns the size of all files in a folder; some may be deleted at the same time."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _write(folder: Path | str, target: Path, tree: Mapping) -> None:
    def write() -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)

    orbax_errors.call(OSError, f"cannot write {folder}", write)


def stored_shapes(folder: Path | str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each stored parameter by path; reads no values.

    Raises:
      ValueError: the folder is damaged.
    """
    params = Path(folder).resolve() / PARAMS
    message = f"{params} is damaged: its list of parameters cannot be read"
    try:
        bounded_size(params / METADATA, MAX_JSON_BYTES)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{params} is damaged: {error}") from None

    def read() -> dict[str, jax.ShapeDtypeStruct]:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(params).item_metadata
        if metadata is None:
            raise ValueError("a file is missing or damaged")
        flat = traverse_util.flatten_dict(metadata.tree, sep=".")
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}

    return orbax_errors.call(ValueError, message, read)


def restore(
    folder: Path | str,
    params: Mapping[str, jax.ShapeDtypeStruct],
    progress: Report | None = None,
) -> dict[str, jax.Array]:
    """Reads parameters directly into their shardings and casts them on the device.

    Parameters are read in groups of at most GROUP_BYTES, or one at a time if they are larger; the
    extra memory needed is that of one group.

    Args:
      folder: a folder written by `save`.
      params: expected shape, dtype and sharding by path; other stored parameters are not read.
      progress: called with the bytes read so far and the total.

    Returns:
      Arrays by path.

    Raises:
      ValueError: the folder is damaged.
    """
    stored = {path: leaf for path, leaf in stored_shapes(folder).items() if path in params}
    folder = Path(folder).resolve() / PARAMS

    def read() -> dict[str, jax.Array]:
        restored, done, total = {}, 0, sum(map(size, stored.values()))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for group in _groups(stored):
                abstract = {path: params[path].update(dtype=stored[path].dtype) for path in group}
                restored |= _restore_group(reader, folder, abstract, params)
                done += sum(size(stored[path]) for path in group)
                if progress is not None:
                    progress(done, total)
        return restored

    return orbax_errors.call(ValueError, f"{folder} is damaged: {UNREADABLE}", read)


def _restore_group(
    reader: ocp.Checkpointer, folder: Path, abstract: Mapping, params: Mapping
) -> dict[str, jax.Array]:
    """Reads parameters with the dtypes in `abstract` and casts them to those in `params`."""
    tree = traverse_util.unflatten_dict(abstract, sep=".")
    args = ocp.args.PyTreeRestore(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    arrays = traverse_util.flatten_dict(reader.restore(folder, args=args), sep=".")
    # Blocks, because otherwise the arrays of many groups would be in memory at the same time.
    return {p: jax.block_until_ready(array.astype(params[p].dtype)) for p, array in arrays.items()}


def size(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the number of bytes of an array."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _groups(stored: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Splits paths into groups of at most GROUP_BYTES, or of one larger array."""
    group, group_size = [], 0
    for path, leaf in stored.items():
        if group and group_size + size(leaf) > GROUP_BYTES:
            yield group
            group, group_size = [], 0
        group.append(path)
        group_size += size(leaf)
    if group:
        yield group


def restore_numpy(
    folder: Path | str, paths: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads parameters into host memory in their stored dtypes, in groups like `restore`.

    Yields:
      Path and array.

    Raises:
      ValueError: the folder is damaged.
    """
    stored = {path: leaf for path, leaf in stored_shapes(folder).items() if path in paths}
    folder = Path(folder).resolve() / PARAMS
    for group in _groups(stored):
        read = functools.partial(_read_numpy, folder, group)
        yield from orbax_errors.call(ValueError, f"{folder} is damaged: {UNREADABLE}", read).items()


def _read_numpy(folder: Path, group: list[str]) -> dict[str, np.ndarray]:
    restore_args = dict.fromkeys(group, ocp.RestoreArgs(restore_type=np.ndarray))
    args = ocp.args.PyTreeRestore(
        item=traverse_util.unflatten_dict(dict.fromkeys(group, 0), sep="."),
        restore_args=traverse_util.unflatten_dict(restore_args, sep="."),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return traverse_util.flatten_dict(reader.restore(folder, args=args), sep=".")
