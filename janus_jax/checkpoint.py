"""Our own checkpoint folder: parameters in Orbax beside the files that make it complete.

FOLDER/params/               the parameter tree (Orbax), each tensor in its own dtype
FOLDER/unused.safetensors    tensors of the source that the model does not use, for exporting
FOLDER/config.json, ...      config, tokenizer and processor files as the source has them
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
from janus_jax.interop.files import CONFIG, PARAMS, write_safetensors_file
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.processor_files import copy_files
from janus_jax.paths import bounded_size
from janus_jax.processing.json_files import MAX_JSON_BYTES, write_json
from janus_jax.progress import Report

UNUSED = "unused.safetensors"
METADATA = "_METADATA"  # Orbax's list of parameters
MARKS = (METADATA, "_CHECKPOINT_METADATA", "manifest.ocdbt")
UNREAD = "a parameter cannot be read"
GROUP_BYTES = 2.5e8  # read at a time
_REPORT_SECONDS = 0.5


def is_orbax(folder: Path | str) -> bool:
    """Whether a folder is one that `save` wrote, whole or damaged."""
    return any(os.path.lexists(Path(folder) / PARAMS / name) for name in MARKS)


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
    """Writes a checkpoint folder beside and renames it when it is complete.

    Orbax takes a copy of host arrays before it writes, so memory for one copy of `params` is used.

    Args:
      params: arrays by path ('und_encoder.pos_embed'), stored in their own dtype.
      config: contents of config.json, in either PyTorch layout.
      files_from: a checkpoint folder whose tokenizer and processor files are copied.
      unused: arrays by PyTorch name that an export gives back.
      progress: called with the bytes that are on the disk and those of the arrays; Orbax compresses
        them, so that the first number may stay below the second.

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
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(_write, folder, beside / PARAMS, tree)
            if progress is not None:
                _report_growth(writing, beside, size, progress)
            writing.result()


def _report_growth(writing: Future, folder: Path, size: int, progress: Report) -> None:
    """Reports the bytes in a folder until it is written."""
    written = 0
    while wait([writing], _REPORT_SECONDS).not_done:
        written = min(max(written, _bytes_in(folder)), size)
        progress(written, size)


def _bytes_in(folder: Path) -> int:
    """Of all files, while some of them come and go."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def _write(folder: Path | str, target: Path, tree: Mapping) -> None:
    def write() -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)

    orbax_errors.call(OSError, f"{folder} could not be written", write)


def stored_params(folder: Path | str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and stored dtype of every parameter by path; reads no values.

    Raises:
      ValueError: the folder is damaged.
    """
    params = Path(folder).resolve() / PARAMS
    what = f"{params} is damaged: its list of parameters cannot be read"
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

    return orbax_errors.call(ValueError, what, read)


def restore(
    folder: Path | str,
    params: Mapping[str, jax.ShapeDtypeStruct],
    progress: Report | None = None,
) -> dict[str, jax.Array]:
    """Reads parameters, each straight to its own sharding, and gives it its dtype there.

    params: shape, dtype and sharding wanted, by path; others that are stored are not read. They are
    read in groups of GROUP_BYTES, or of one parameter that is larger; no more than that is in
    memory beside them.
    progress: called with the bytes read so far and in all.

    Raises:
      ValueError: the folder is damaged.
    """
    stored = stored_params(folder)
    stored = {path: leaf for path, leaf in stored.items() if path in params}
    folder = Path(folder).resolve() / PARAMS

    def read() -> dict[str, jax.Array]:
        restored, done, total = {}, 0, sum(map(size, stored.values()))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for group in _groups(stored):
                wanted = {path: params[path].update(dtype=stored[path].dtype) for path in group}
                restored |= _restore_group(reader, folder, wanted, params)
                done += sum(size(stored[path]) for path in group)
                if progress is not None:
                    progress(done, total)
        return restored

    return orbax_errors.call(ValueError, f"{folder} is damaged: {UNREAD}", read)


def _restore_group(
    reader: ocp.Checkpointer, folder: Path, wanted: Mapping, params: Mapping
) -> dict[str, jax.Array]:
    tree = traverse_util.unflatten_dict(wanted, sep=".")
    how = ocp.args.PyTreeRestore(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    read = traverse_util.flatten_dict(reader.restore(folder, args=how), sep=".")
    # waited for, or the arrays of many groups would be there at once
    return {p: jax.block_until_ready(array.astype(params[p].dtype)) for p, array in read.items()}


def size(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _groups(stored: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    group, held = [], 0
    for path, leaf in stored.items():
        own = size(leaf)
        if group and held + own > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += own
    if group:
        yield group


def restore_numpy(
    folder: Path | str, paths: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads parameters into host memory, in the dtypes they are stored in, by groups as restore.

    Raises:
      ValueError: the folder is damaged.
    """
    stored = {path: leaf for path, leaf in stored_params(folder).items() if path in paths}
    folder = Path(folder).resolve() / PARAMS
    for group in _groups(stored):
        read = functools.partial(_read_numpy, folder, group)
        yield from orbax_errors.call(ValueError, f"{folder} is damaged: {UNREAD}", read).items()


def _read_numpy(folder: Path, group: list[str]) -> dict[str, np.ndarray]:
    args = dict.fromkeys(group, ocp.RestoreArgs(restore_type=np.ndarray))
    how = ocp.args.PyTreeRestore(
        item=traverse_util.unflatten_dict(dict.fromkeys(group, 0), sep="."),
        restore_args=traverse_util.unflatten_dict(args, sep="."),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return traverse_util.flatten_dict(reader.restore(folder, args=how), sep=".")
