"""Checkpoint folders on disk: written beside and renamed, small files copied, tensors streamed."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from janus_jax.interop.readers import SAFETENSORS, SAFETENSORS_DTYPES
from janus_jax.paths import check_local, os_errors_of, sibling
from janus_jax.processing.json_files import write_json

CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
WEIGHTS = ("*.safetensors", "*.bin", "params")  # the last is Orbax's
SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool = False, size: int = 0) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` on success and disappears on any error.

    size: bytes about to be written, as far as known.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is not set.
      OSError: the disk has no room.
      ValueError: `folder` is not on a disk, or is there and neither empty nor a checkpoint folder.
    """
    check_local("the folder to write", folder)
    folder = Path(folder).resolve()
    _check_replaced(folder, overwrite)
    new = [parent for parent in folder.parents if not parent.exists()]
    free = shutil.disk_usage(folder.parents[len(new)]).free
    if size > free:
        gigabytes = f"{size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise OSError(f"no room on the disk for {folder}: it needs {gigabytes}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = sibling(folder)
    beside.mkdir()
    try:
        yield beside
        _check_replaced(folder, overwrite)  # what came meanwhile is nobody's to delete
        _replace(beside, folder)
    finally:
        _delete(beside)
        for parent in new:  # empty after a failure, and only then
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_replaced(folder: Path, overwrite: bool) -> None:
    """Raises FileExistsError or ValueError if there is something that must not be replaced."""
    if not os.path.lexists(folder):
        return
    if not _is_checkpoint_or_empty(folder):
        raise ValueError(
            f"{folder} exists and is never replaced: only an empty folder is, or a checkpoint "
            f"folder, which holds {CONFIG} and weights"
        )
    if not overwrite:
        raise FileExistsError(f"{folder} exists (--overwrite replaces it)")


def _is_checkpoint_or_empty(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    weights = any(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return not any(folder.iterdir()) or ((folder / CONFIG).is_file() and weights)


def _replace(beside: Path, folder: Path) -> None:
    if not folder.exists():
        beside.rename(folder)
        return
    old = sibling(folder)
    try:
        folder.rename(old)
        beside.rename(folder)
    except BaseException:  # an interrupt, too, must not cost the folder that was there
        if not folder.exists():
            old.rename(folder)
        raise
    finally:
        _delete(old)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # an interrupt, after which nothing would come back to the rest
        shutil.rmtree(folder, ignore_errors=True)
        raise


def small_files(folder: Path) -> list[Path]:
    """Config, tokenizer and processor files of a checkpoint folder."""
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    return sorted(p for p in found if p.is_file() and not p.name.endswith(".index.json"))


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder's weights tensor by tensor: one file, or shards with an index.

    tensors: dtype and shape by name; read: the values of one name, asked for once, in order.
    """
    shards, total = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors_file(folder / SAFETENSORS, shards[0], read)
        return
    stem, weight_map = SAFETENSORS.removesuffix(".safetensors"), {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors_file(folder / file, shard, read)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{SAFETENSORS}.index.json", index)


def _shards(tensors: Mapping, shard_bytes: int) -> tuple[list[dict], int]:
    shards, held, total = [{}], 0, 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, shape)
        held, total = held + size, total + size
    return shards, total


def write_safetensors_file(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes one safetensors file; only one tensor is in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        fields = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        header[name] = fields
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, so readers can map it
    with os_errors_of(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, _) in tensors.items():
            values = np.ascontiguousarray(read(name), dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
