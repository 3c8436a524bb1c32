"""The files of a checkpoint folder: small files to copy, and safetensors written as a stream."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from janus_jax.interop.readers import SAFETENSORS, SAFETENSORS_DTYPES
from janus_jax.paths import os_errors_of, write_json

Report = Callable[[int, int], None]  # called with the amount done and the total, in any unit

CONFIG = "config.json"
PARAMS = "params"  # subfolder with the parameters of an Orbax folder
METADATA = "_METADATA"  # Orbax's list of parameters, in PARAMS
ORBAX_FILES = (METADATA, "_CHECKPOINT_METADATA", "manifest.ocdbt")  # any of them is in PARAMS
ADAPTER_CONFIG = "adapter_config.json"  # config of a LoRA adapter in PEFT's format
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def small_files(folder: Path) -> list[Path]:
    """Returns the config, tokenizer and processor files of a checkpoint folder."""
    paths = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    excluded = (".index.json", ADAPTER_CONFIG)  # they belong to weights that are not copied
    return sorted(p for p in paths if p.is_file() and not p.name.endswith(excluded))


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    progress: Report | None = None,
) -> None:
    """Writes a folder's weights one tensor at a time: a single file, or shards with an index.

    Args:
      folder: an existing folder.
      tensors: dtype and shape by name.
      read: returns the values of a tensor; called once per name, in order.
      shard_bytes: maximum bytes of a shard, unless a single tensor is larger.
      progress: called with the bytes written so far and the total.
    """
    shards, total = _shards(tensors, shard_bytes)
    if progress is not None:
        read = _with_progress(read, tensors, total, progress)
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


def _with_progress(
    read: Callable[[str], np.ndarray],
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    total: int,
    progress: Report,
) -> Callable[[str], np.ndarray]:
    """Wraps `read` so that each call first reports the bytes of all tensors written before."""
    done = 0

    def read_and_report(name: str) -> np.ndarray:
        nonlocal done
        progress(done, total)
        dtype, shape = tensors[name]
        done += dtype.itemsize * math.prod(shape)
        return read(name)

    return read_and_report


def _shards(tensors: Mapping, shard_bytes: int) -> tuple[list[dict], int]:
    """Splits tensors into shards; also returns the total number of bytes."""
    shards, shard_size, total = [{}], 0, 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append({})
            shard_size = 0
        shards[-1][name] = (dtype, shape)
        shard_size, total = shard_size + size, total + size
    return shards, total


def write_safetensors_file(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes one safetensors file; holds only one tensor in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        fields = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        header[name] = fields
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data, so that readers can memory-map it
    with os_errors_of(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, _) in tensors.items():
            values = np.ascontiguousarray(read(name), dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
