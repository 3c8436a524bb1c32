"""Reads the index of a PyTorch `.bin` file (a zip with a pickle) without torch and without pickle.

The pickle's opcodes are interpreted here, as torch's own weights_only unpickler does. They can
build strings, numbers, tuples, lists and dicts, name a storage, and describe a tensor in it. Any
other opcode or name is refused before it is looked up, so nothing in the file is executed. Each
opcode takes time and memory in proportion to its bytes: memo indices are keys of a dict, and only
strings are keys of pickled dicts (the hash of nested tuples can take exponential time).
Format: a stored (not compressed) zip holding `X/data.pkl`, `X/byteorder` and `X/data/<key>`.
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
MAX_PICKLE = 2**24  # bytes; a tensor takes about 200
MAX_OPCODES = 2**20  # a tensor takes about 35
# What a damaged zip directory or pickle raises in zipfile and pickletools.
_DAMAGE = (
    ValueError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    NotImplementedError,
)


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a `torch.save`d state dict by name; only the zip's index and pickle are read.

    The checksums of the tensors' data are not compared, as torch does not compare them either: that
    would read every byte of the file.

    Raises:
      ValueError: not such a file, damaged, or the pickle names anything but tensors.
    """
    try:
        _check_is_zip(path)
        return _read_members(path, locate_members(path))
    except _DAMAGE as error:
        raise ValueError(f"refusing to load {path}: {error_text(error)}") from None


def _check_is_zip(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise ValueError("it is a pickle from before torch 1.6; save it again as a zip file")
    if start[:2] != b"PK":
        raise ValueError(f"it is not a PyTorch file: it starts with {start!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is truncated: the zip directory at its end is missing")


def _read_members(path: Path, members: dict[str, Member]) -> dict[str, Tensor]:
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a PyTorch file holds one data.pkl, got {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")
    if order := members.get(f"{root}byteorder"):
        found = read_member(path, f"{root}byteorder", order, limit=16)
        if found != b"little":
            raise ValueError(f"its byte order must be 'little', got {found.decode('latin-1')!r}")
    state = _state_dict(read_member(path, pickles[0], members[pickles[0]], MAX_PICKLE))
    size, tensors = path.stat().st_size, {}
    for name, view in state.items():
        key = f"{root}data/{view.storage.key}"
        if key not in members:
            raise ValueError(f"it lacks {shorten(key)}, which its pickle refers to")
        tensors[name] = _place(path, name, view, members[key])
        if view.storage.dtype.itemsize * math.prod(view.shape) > size:  # an expanded tensor
            raise ValueError(f"{shorten(name)} of shape {shorten(view.shape)} exceeds the file")
    return tensors


def _place(path: Path, name: str, view: "_View", member: Member) -> Tensor:
    itemsize = view.storage.dtype.itemsize
    span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    last = view.offset + (0 if 0 in view.shape else span)
    if last * itemsize > member.size:
        needs = f"needs {last * itemsize} bytes, its storage has {member.size}"
        raise ValueError(f"{shorten_text(name)} {needs}")
    offset = member.offset + view.offset * itemsize
    return Tensor(path, offset, view.storage.dtype, view.shape, view.strides)


class _Global(enum.Enum):
    """The callables that a state dict names."""

    ORDERED_DICT = "collections.OrderedDict"
    REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"


class _Dtype(NamedTuple):
    """What a storage class of the pickle stands for."""

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
        raise ValueError(f"it must hold a dict of tensors, got a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, _View):
            found = type(value).__name__
            raise ValueError(f"it must hold tensors only, got {shorten(name)}: {found}")
    return state


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE"
)
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_COUNTED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Interpreter:
    """The stack and the memo of a pickle; one method per kind of opcode that `handlers` lists."""

    def __init__(self):
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        push, stack = self.stack.append, self.stack
        self.handlers = {
            **dict.fromkeys(_LITERALS.split(), push),
            **{name: lambda _, make=make: push(make()) for name, make in _EMPTY.items()},
            **{name: lambda _, value=value: push(value) for name, value in _CONSTANTS.items()},
            **{name: lambda _, n=n: push(self._take(n)) for name, n in _COUNTED_TUPLES.items()},
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._memoize),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i: push(self._recall(i))),
            "MEMOIZE": lambda _: self._memoize(len(self.memo)),
            "MARK": lambda _: self.marks.append(len(stack)),
            "TUPLE": lambda _: push(self._take_marked()),
            "LIST": lambda _: push(list(self._take_marked())),
            "DICT": lambda _: self._set_items(self._take_marked(), {}),
            "APPEND": lambda _: self._extend(self._take(1)),
            "APPENDS": lambda _: self._extend(self._take_marked()),
            "SETITEM": lambda _: self._set_items(self._take(2), self._take(1)[0]),
            "SETITEMS": lambda _: self._set_items(self._take_marked(), self._take(1)[0]),
            "GLOBAL": lambda text: push(_look_up(*text.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(_look_up(*self._take(2))),
            "BINPERSID": lambda _: push(_storage(*self._take(1))),
            "REDUCE": lambda _: push(_call(*self._take(2))),
            "BUILD": lambda _: self._build(),
        }

    def run(self, data: bytes):
        """The value that a pickle describes."""
        for count, (opcode, argument) in enumerate(_opcodes(data)):
            if opcode.name == "STOP":
                return self._take(1)[0]
            if opcode.name not in self.handlers or count >= MAX_OPCODES:
                refused = opcode.name if count < MAX_OPCODES else f"more than {count} opcodes"
                raise ValueError(f"its pickle uses {refused}, and only tensors are read")
            self.handlers[opcode.name](argument)
        raise ValueError("its pickle has no end")

    def _top(self):
        if not self.stack:
            raise ValueError("its pickle takes more from the stack than there is")
        return self.stack[-1]

    def _take(self, count: int) -> tuple:
        """The topmost values, which leave the stack."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes more from the stack than there is")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def _take_marked(self) -> tuple:
        if not self.marks:
            raise ValueError("its pickle ends a list that it has not begun")
        start = self.marks.pop()
        items = tuple(self.stack[start:])
        del self.stack[start:]
        return items

    def _memoize(self, index: int) -> None:
        self.memo[index] = self._top()

    def _recall(self, index: int):
        if index not in self.memo:
            raise ValueError(f"its pickle recalls value {shorten(index)}, which it has not stored")
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
                raise ValueError(f"its pickle names a value by a {type(name).__name__}, not a text")
            target[name] = value
        self.stack.append(target)

    def _build(self) -> None:
        """An OrderedDict may have attributes (torch sets `_metadata`); they are dropped."""
        target, _ = self._take(2)
        if type(target) is not collections.OrderedDict:
            raise ValueError(f"its pickle sets attributes of a {type(target).__name__}")
        self.stack.append(target)


def _opcodes(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    try:
        yield from ((opcode, argument) for opcode, argument, _ in pickletools.genops(data))
    except _DAMAGE as error:
        raise ValueError(f"its pickle is damaged: {shorten_text(str(error))}") from None


def _look_up(module, name):
    full = f"{module}.{name}" if type(module) is type(name) is str else "no text"
    if full in _GLOBALS:
        return _GLOBALS[full]
    raise ValueError(f"its pickle names {shorten_text(full)}, and only tensors are read")


def _storage(pid) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
        raise ValueError(f"its pickle refers to a {type(pid).__name__} that is no storage")
    _, kind, key, _, size = pid
    if not (isinstance(kind, _Dtype) and isinstance(key, str) and type(size) is int):
        raise ValueError("its pickle describes a storage by other than type, key, place and size")
    return _Storage(key, kind.dtype)


def _call(function, arguments):
    if function is _Global.ORDERED_DICT and arguments == ():
        return collections.OrderedDict()
    if function is _Global.REBUILD_TENSOR and isinstance(arguments, tuple):
        return _rebuild(*arguments)
    raise ValueError(f"its pickle calls a {type(function).__name__}")


def _rebuild(storage=None, offset=None, shape=None, strides=None, *rest) -> _View:
    """torch._utils._rebuild_tensor_v2; the rest (gradients, hooks) does not concern the values."""
    if not isinstance(storage, _Storage) or not is_shape(shape, storage.dtype):
        raise ValueError(f"a tensor has no storage or the shape {shorten(shape)}")
    numbers = (offset, *strides) if isinstance(strides, tuple) else (None,)
    if len(numbers) != 1 + len(shape) or not all(is_shape((n,), storage.dtype) for n in numbers):
        raise ValueError(f"a tensor of shape {shorten(shape)} has strides {shorten(strides)}")
    return _View(storage, offset, shape, strides)
