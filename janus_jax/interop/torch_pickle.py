"""Reads the index of a PyTorch `.bin` file (a zip with a pickle) without torch.

The unpickler can name a tensor's storage, build a tensor from it and build an OrderedDict. Any
other name in the pickle is refused before it is looked up, so nothing in the file is executed.
What these names give holds no attributes that can be set: the opcode BUILD, which would write
behind the checks (or into a function), fails on all of it but an OrderedDict.
Format: a stored (not compressed) zip holding `X/data.pkl`, `X/byteorder` and `X/data/<key>`.
"""

import collections
import pickle
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from janus_jax.interop.tensors import BFLOAT16, Tensor

STORAGES = {
    "BFloat16Storage": BFLOAT16,
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # zip local file header, without name and extra field


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a `torch.save`d state dict by name; only the zip's index and pickle are read.

    Raises:
      ValueError: not such a file, damaged, or the pickle names anything but tensors.
    """
    try:
        _check_is_zip(path)
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None


def _check_is_zip(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is truncated: the zip's directory at its end is missing")
        return
    if start[:1] == b"\x80":
        raise ValueError(f"{path} is a pickle from before torch 1.6: save it again as a zip file")
    raise ValueError(f"{path} is not a PyTorch file: it starts with {start!r}")


def _read_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path} is not a PyTorch file: it holds {len(pickles)} data.pkl, not 1")
    root = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
    if order != b"little":
        raise ValueError(f"{path} has byte order {order.decode(errors='replace')!r}, not 'little'")
    with archive.open(pickles[0]) as stream:
        stored = _unpickle(path, stream)
    storages: dict[str, tuple[int, int]] = {}
    tensors = {}
    for name, item in stored.items():
        key = item.storage.key
        if key not in storages:
            storages[key] = _locate(path, members, f"{root}data/{key}")
        tensors[name] = _place(path, name, item, *storages[key])
    return tensors


class _Dtype(NamedTuple):
    """What a storage class of the pickle stands for; not callable, so a pickle cannot call it."""

    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands in for torch._utils._rebuild_tensor_v2; no function, whose defaults could be set."""

    __slots__ = ()

    def __call__(
        self, storage, offset, shape, strides, requires_grad, hooks, metadata=None
    ) -> _View:
        """The last three do not concern the values."""
        shape, strides = tuple(shape), tuple(strides)
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor is described by something other than a storage and sizes")
        if len(shape) != len(strides):
            raise ValueError(f"a tensor has shape {shape} and strides {strides}")
        return _View(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in STORAGES:
            return _Dtype(STORAGES[name])
        raise ValueError(f"its pickle names {module}.{name}, and only tensors are read")

    def persistent_load(self, pid) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise ValueError(f"its pickle refers to {pid!r}, and only storages are read")
        _, kind, key, _, size = pid
        if not (isinstance(kind, _Dtype) and isinstance(key, str) and type(size) is int):
            raise ValueError(f"its pickle describes a storage as {pid!r}")
        return _Storage(key, kind.dtype)


def _unpickle(path: Path, stream) -> dict[str, _View]:
    try:
        stored = _TensorUnpickler(stream).load()
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; none of them is ours
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is refused: {text}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dict of tensors")
    # not stored.items(): an OrderedDict may hold an attribute of that name
    stored = dict(dict.items(stored))
    for name, item in stored.items():
        if not (isinstance(name, str) and isinstance(item, _View)):
            raise ValueError(f"{path} holds {name!r}: {type(item).__name__}, not a named tensor")
    return stored


def _locate(path: Path, members: dict[str, zipfile.ZipInfo], name: str) -> tuple[int, int]:
    """Byte offset and length of a stored zip member."""
    info = members.get(name)
    if info is None:
        raise ValueError(f"{path} is damaged: it lacks {name}, which its pickle refers to")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is compressed ({name}): PyTorch stores tensors uncompressed")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: {name} has no zip header at {info.header_offset}")
    name_size, extra_size = LOCAL_HEADER.unpack(header)[-2:]
    offset = info.header_offset + LOCAL_HEADER.size + name_size + extra_size
    if offset + info.file_size > path.stat().st_size:
        raise ValueError(f"{path} is truncated: {name} ends beyond the file")
    return offset, info.file_size


def _place(path: Path, name: str, view: _View, start: int, size: int) -> Tensor:
    itemsize = view.storage.dtype.itemsize
    span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    last = view.offset + (0 if 0 in view.shape else span)
    if last * itemsize > size:
        raise ValueError(f"{path}: {name} needs {last * itemsize} bytes, its storage has {size}")
    offset = start + view.offset * itemsize
    return Tensor(path, offset, view.storage.dtype, view.shape, view.strides)
