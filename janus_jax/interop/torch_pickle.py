"""Reads the index of a PyTorch `.bin` file (a zip with a pickle) without torch and without pickle.

This module interprets the pickle's opcodes itself, like torch's weights_only unpickler. The
supported opcodes can build strings, numbers, tuples, lists and dicts, name a storage, and describe
a tensor in it. Any other opcode or name is refused before it is resolved, so nothing in the file is
executed. Each opcode takes time and memory in proportion to its bytes: the memo is a dict, so that
a large index allocates nothing, and pickled dicts may only have strings as keys, because the hash
of nested tuples can take exponential time.
Format: an uncompressed zip with the members `X/data.pkl`, `X/byteorder` and `X/data/<key>`.
"""

import collections
import enum
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from janus_jax.checks import error_text, shorten, shorten_text
from janus_jax.interop.tensors import BFLOAT16, Tensor, is_shape
from janus_jax.interop.torch_zip import Member, locate_members, read_member

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
MAX_PICKLE = 2**24  # bytes; a tensor needs about 200
MAX_OPCODES = 2**20  # a tensor needs about 35
# Raised by zipfile and pickletools for a damaged zip directory or pickle.
_DAMAGE_ERRORS = (
    ValueError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
)


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Reads the index of a state dict saved with `torch.save`: its tensors by name.

    Only the zip directory and the pickle are read. The checksums of tensor data are not verified,
    because that would read every byte of the file; torch does not verify them either.

    Raises:
      ValueError: the file has another format, is damaged, or its pickle uses anything but tensors.
    """
    try:
        _check_is_zip(path)
        return _read_members(path, locate_members(path))
    except _DAMAGE_ERRORS as error:
        raise ValueError(f"refusing to load {path}: {error_text(error)}") from None


def _check_is_zip(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise ValueError(
            "it is a pickle in the format before torch 1.6; save it again with a newer torch"
        )
    if start[:2] != b"PK":
        raise ValueError(f"it is not a PyTorch file: it starts with {start!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is truncated: the zip directory at the end is missing")


def _read_members(path: Path, members: dict[str, Member]) -> dict[str, Tensor]:
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"expected one data.pkl in the zip file, found {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")
    if member := members.get(f"{root}byteorder"):
        order = read_member(path, f"{root}byteorder", member, limit=16)
        if order != b"little":
            raise ValueError(f"its byte order must be 'little', got {order.decode('latin-1')!r}")
    state = _state_dict(read_member(path, pickles[0], members[pickles[0]], MAX_PICKLE))
    size, tensors = path.stat().st_size, {}
    for name, view in state.items():
        key = f"{root}data/{view.storage.key}"
        if key not in members:
            raise ValueError(f"its pickle refers to {shorten(key)}, which is missing")
        tensors[name] = _locate(path, name, view, members[key])
        if view.storage.dtype.itemsize * math.prod(view.shape) > size:  # an expanded tensor
            raise ValueError(
                f"{shorten(name)} of shape {shorten(view.shape)} is larger than the file"
            )
    return tensors


def _locate(path: Path, name: str, view: "_View", member: Member) -> Tensor:
    """Returns the tensor that a view of a storage describes; the storage is a zip member."""
    itemsize = view.storage.dtype.itemsize
    span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    last = view.offset + (0 if 0 in view.shape else span)
    if last * itemsize > member.size:
        raise ValueError(
            f"{shorten_text(name)} needs {last * itemsize} bytes, its storage has {member.size}"
        )
    offset = member.offset + view.offset * itemsize
    return Tensor(path, offset, view.storage.dtype, view.shape, view.strides)


class _Global(enum.Enum):
    """The callables that the pickle of a state dict may name."""

    ORDERED_DICT = "collections.OrderedDict"
    REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"


class _Dtype(NamedTuple):
    """The dtype that a storage class in the pickle stands for."""

    dtype: np.dtype


_GLOBALS = {item.value: item for item in _Global}
_GLOBALS |= {f"torch.{name}": _Dtype(dtype) for name, dtype in STORAGES.items()}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _state_dict(data: bytes) -> dict[str, _View]:
    state = _Interpreter().run(data)
    if not isinstance(state, dict):
        raise ValueError(f"expected a dict of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, _View):
            found = type(value).__name__
            raise ValueError(f"expected a dict of tensors only, got {shorten(name)}: {found}")
    return state


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE"
)
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_COUNTED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Interpreter:
    """A pickle machine with a stack and a memo; `handlers` maps opcode names to functions."""

    def __init__(self):
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        push, stack = self.stack.append, self.stack
        self.handlers = {
            **dict.fromkeys(_LITERALS.split(), push),
            **{name: lambda _, make=make: push(make()) for name, make in _EMPTY.items()},
            **{name: lambda _, value=value: push(value) for name, value in _CONSTANTS.items()},
            **{name: lambda _, n=n: push(self._pop(n)) for name, n in _COUNTED_TUPLES.items()},
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._memoize),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i: push(self._get_memo(i))),
            "MEMOIZE": lambda _: self._memoize(len(self.memo)),
            "MARK": lambda _: self.marks.append(len(stack)),
            "TUPLE": lambda _: push(self._pop_mark()),
            "LIST": lambda _: push(list(self._pop_mark())),
            "DICT": lambda _: self._set_items(self._pop_mark(), {}),
            "APPEND": lambda _: self._extend(self._pop(1)),
            "APPENDS": lambda _: self._extend(self._pop_mark()),
            "SETITEM": lambda _: self._set_items(self._pop(2), self._pop(1)[0]),
            "SETITEMS": lambda _: self._set_items(self._pop_mark(), self._pop(1)[0]),
            "GLOBAL": lambda text: push(_find_global(*text.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(_find_global(*self._pop(2))),
            "BINPERSID": lambda _: push(_storage(*self._pop(1))),
            "REDUCE": lambda _: push(_call(*self._pop(2))),
            "BUILD": lambda _: self._build(),
        }

    def run(self, data: bytes):
        """Returns the value that a pickle describes."""
        for count, (opcode, argument) in enumerate(_opcodes(data)):
            if opcode.name == "STOP":
                return self._pop(1)[0]
            if count >= MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")
            if opcode.name not in self.handlers:
                raise ValueError(f"its pickle uses {opcode.name}, and only tensors are supported")
            self.handlers[opcode.name](argument)
        raise ValueError("its pickle has no STOP opcode")

    def _top(self):
        if not self.stack:
            raise ValueError("its pickle pops from an empty stack")
        return self.stack[-1]

    def _pop(self, count: int) -> tuple:
        """Pops the topmost values from the stack."""
        if len(self.stack) < count:
            raise ValueError("its pickle pops from an empty stack")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def _pop_mark(self) -> tuple:
        """Pops all values above the last mark."""
        if not self.marks:
            raise ValueError("its pickle pops a mark that it has not pushed")
        start = self.marks.pop()
        items = tuple(self.stack[start:])
        del self.stack[start:]
        return items

    def _memoize(self, index: int) -> None:
        self.memo[index] = self._top()

    def _get_memo(self, index: int):
        if index not in self.memo:
            raise ValueError(f"its pickle gets memo {shorten(index)}, which it has not put")
        return self.memo[index]

    def _extend(self, items: tuple) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError(f"its pickle appends to a {type(target).__name__}")
        target.extend(items)

    def _set_items(self, items: tuple, target) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"its pickle sets items of a {type(target).__name__}")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if type(name) is not str:
                raise ValueError(f"its pickle has a {type(name).__name__} as a dict key, not a str")
            target[name] = value
        self.stack.append(target)

    def _build(self) -> None:
        """Ignores the attributes of an OrderedDict (torch sets `_metadata`)."""
        target, _ = self._pop(2)
        if type(target) is not collections.OrderedDict:
            raise ValueError(f"its pickle sets attributes of a {type(target).__name__}")
        self.stack.append(target)


def _opcodes(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    try:
        yield from ((opcode, argument) for opcode, argument, _ in pickletools.genops(data))
    except _DAMAGE_ERRORS as error:
        raise ValueError(f"its pickle is damaged: {shorten_text(str(error))}") from None


def _find_global(module, name):
    if not type(module) is type(name) is str:
        raise ValueError("its pickle names a global by other than strings")
    full = f"{module}.{name}"
    if full in _GLOBALS:
        return _GLOBALS[full]
    raise ValueError(f"its pickle names {shorten_text(full)}, and only tensors are supported")


def _storage(pid) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
        raise ValueError(
            f"its pickle has a persistent id that is not a storage, but a {type(pid).__name__}"
        )
    _, kind, key, _, size = pid
    if not (isinstance(kind, _Dtype) and isinstance(key, str) and type(size) is int):
        raise ValueError("its pickle has a storage without a valid type, key, device and size")
    return _Storage(key, kind.dtype)


def _call(function, arguments):
    if function is _Global.ORDERED_DICT and arguments == ():
        return collections.OrderedDict()
    if function is _Global.REBUILD_TENSOR and isinstance(arguments, tuple):
        return _rebuild_tensor(*arguments)
    raise ValueError(f"its pickle calls a {type(function).__name__}")


def _rebuild_tensor(storage=None, offset=None, shape=None, strides=None, *rest) -> _View:
    """torch._utils._rebuild_tensor_v2; `rest` (gradients, hooks) does not affect the values."""
    if not isinstance(storage, _Storage) or not is_shape(shape, storage.dtype):
        raise ValueError(f"a tensor has no storage, or an invalid shape: {shorten(shape)}")
    numbers = (offset, *strides) if isinstance(strides, tuple) else (None,)
    if len(numbers) != 1 + len(shape) or not all(is_shape((n,), storage.dtype) for n in numbers):
        raise ValueError(
            f"a tensor of shape {shorten(shape)} has invalid strides {shorten(strides)} or an "
            f"invalid offset {shorten(offset)}"
        )
    return _View(storage, offset, shape, strides)
