"""One door to the weight files of a PyTorch checkpoint folder: names, shapes and tensors."""

import collections
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop.names import few, wrapper
from janus_jax.interop.quantised import ADVICE, GGUF, QUANTISED_DTYPES
from janus_jax.interop.tensors import BFLOAT16, Tensor, TensorSource, is_shape
from janus_jax.interop.torch_pickle import read_torch_file
from janus_jax.paths import bounded_size
from janus_jax.processing.json_files import parse, read_json

SAFETENSORS_DTYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DOUBLED = "stored twice"
SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")  # read or not
MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
MAX_WEIGHTS = 2**63 - 1  # bytes of a file, of which only headers are read whole
_LFS = b"version https://git-lfs"  # what a clone without Git LFS has in place of each large file

Read = tuple[dict[str, Tensor], list[str]]  # tensors by name, and names that the file holds twice


def open_checkpoint(
    folder: Path | str, names: tuple[str, str] = (SAFETENSORS, TORCH_BIN)
) -> TensorSource:
    """Finds a folder's weights: safetensors before `.bin`, one file before an index.

    names: of the safetensors file and of the `.bin` file.

    Raises:
      FileNotFoundError: no folder, or no weights in it.
      ValueError: truncated or damaged files, files that are not regular, an index that names a
        missing shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    kinds = tuple(zip(names, (read_safetensors, _read_torch), strict=True))
    for name, read in kinds:
        index = folder / f"{name}.index.json"
        if os.path.lexists(folder / name):
            tensors, doubled = _read_file(folder / name, read)
            return _unwrapped(TensorSource(folder, tensors, {DOUBLED: doubled} if doubled else {}))
        if os.path.lexists(index):
            return _unwrapped(_open_shards(folder, index, read))
    looked_for = ", ".join(f"{name}[.index.json]" for name, _ in kinds)
    found = f"{folder} holds no weights: looked for {looked_for}{_others(folder)}"
    raise FileNotFoundError(found)


def _others(folder: Path) -> str:
    """Weights of other names or formats in a folder, and what to do about them."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in WEIGHT_SUFFIXES)
    if not names:
        return ""
    found = f", found {few(list(map(shorten_text, names)))}"
    if any(name.lower().endswith(".gguf") for name in names):
        return f"{found}; {GGUF}"
    shards = all("-of-" in name for name in names)
    return found + ("; shards need the index that was saved with them" if shards else "")


def _unwrapped(source: TensorSource) -> TensorSource:
    """The tensors by the names that they have without a wrapper's prefix."""
    prefix = wrapper(source.names)
    if not prefix:
        return source
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)


def _read_file(path: Path, read: Callable[[Path], Read]) -> Read:
    bounded_size(path, MAX_WEIGHTS)
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(f"{path} is no weights but a pointer to them: run git lfs pull")
    return read(path)


def _read_torch(path: Path) -> Read:
    return read_torch_file(path), []


def read_safetensors(path: Path) -> Read:
    """Tensors of a safetensors file by name, and the names it holds twice; reads only its header.

    Format: uint64 header size, JSON header (name -> dtype, shape, data_offsets), bytes.
    """
    size = bounded_size(path, MAX_WEIGHTS)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if 8 + header_size > size:
            raise ValueError(f"{path} is truncated: its header is {header_size=}, the file {size=}")
        if header_size > MAX_HEADER:
            raise ValueError(
                f"{path} must have a header of at most {MAX_HEADER} bytes, got {header_size}"
            )
        raw = file.read(header_size)
    header, doubled = _parse_header(path, raw)
    tensors = {
        name: _place(path, name, fields, 8 + header_size)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is truncated: its tensors need {end} bytes, the file has {size}")
    if not doubled:  # names stored twice are told with all else that the plan finds
        _check_covered(path, tensors, 8 + header_size, size)
    return tensors, doubled


def _check_covered(path: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Raises ValueError unless the tensors fill the file from `start`, none over another."""
    spans = sorted((tensor.offset, tensor.end, name) for name, tensor in tensors.items())
    for begin, end, name in [*spans, (size, size, "the end of the file")]:
        if begin != start:
            raise ValueError(
                f"{path} has a damaged safetensors header: {shorten_text(name)} must be at byte "
                f"{start}, where what is before it ends, got {begin}"
            )
        start = end


def _parse_header(path: Path, raw: bytes) -> tuple[dict, list[str]]:
    doubled: list[str] = []

    def noted(pairs: list[tuple[str, object]]) -> dict:
        counts = collections.Counter(name for name, _ in pairs)
        doubled.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        header = parse(raw, object_pairs_hook=noted)
    except ValueError as error:
        raise ValueError(f"{path} has a damaged safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a damaged safetensors header: not a JSON object")
    return header, doubled


def _place(path: Path, name: str, fields: dict, data: int) -> Tensor:
    shown = shorten_text(name)
    try:
        kind, shape = fields["dtype"], tuple(fields["shape"])
        start, end = fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        found = shorten(fields)
        raise ValueError(f"{path} has a damaged safetensors header at {shown}: {found}") from None
    if not isinstance(kind, str) or kind not in SAFETENSORS_DTYPES:
        got = f"{shown} has dtype {shorten(kind)}"
        if str(kind).startswith(QUANTISED_DTYPES):
            raise ValueError(f"{path} holds quantised weights ({got}); {ADVICE}")
        raise ValueError(f"{path}: {got}, not one of {', '.join(SAFETENSORS_DTYPES)}")
    dtype = SAFETENSORS_DTYPES[kind]
    if not is_shape(shape, dtype) or not is_shape((start,), dtype) or not is_shape((end,), dtype):
        found = shorten(fields)
        raise ValueError(f"{path} has a damaged safetensors header at {shown}: {found}")
    needs = dtype.itemsize * math.prod(shape)
    if end - start != needs:
        of = f"{shown} of shape {shorten(shape)}"
        raise ValueError(f"{path}: {of} needs {needs} bytes, has {end - start}")
    return Tensor(path, data + start, dtype, shape)


def _is_file_name(name: str) -> bool:
    """Whether it can be that of a file in a folder; ".." is Path's name of ".."."""
    plain = name not in ("", "..") and Path(name).name == name
    return plain and len(name.encode(errors="replace")) <= 255


def _open_shards(
    folder: Path, index: Path, read: Callable[[Path], Read]
) -> TensorSource:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    files = sorted(set(weight_map.values()))
    if elsewhere := [shorten(name) for name in files if not _is_file_name(name)]:
        raise ValueError(f"{index} must name files beside it, got {few(elsewhere)}")
    if absent := [shorten(name) for name in files if not (folder / name).exists()]:
        found = f"{len(absent)} of {len(files)} are missing: {few(absent)}"
        raise FileNotFoundError(f"{index} names shards of which {found}")
    tensors: dict[str, Tensor] = {}
    doubled, unlisted = [], []
    for file in files:
        found, twice = _read_file(folder / file, read)
        doubled += twice
        for name, tensor in found.items():
            if name in tensors:
                doubled.append(name)
            elif name not in weight_map:
                unlisted.append(name)
            tensors.setdefault(name, tensor)
    astray = [n for n, f in weight_map.items() if n not in tensors or tensors[n].file.name != f]
    faults = {
        DOUBLED: doubled,
        "absent from the shard that the index names": [n for n in astray if n not in doubled],
        "stored but not in the index": unlisted,
    }
    return TensorSource(folder, tensors, {kind: names for kind, names in faults.items() if names})
