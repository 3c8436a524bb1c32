"""Lazy tensors: named byte ranges of checkpoint files that are read on demand.

Also lists the names of tensors in messages, and finds the prefixes that wrapper modules add to all
names.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from janus_jax.checks import shorten_text

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_RANK = 64  # NumPy's maximum number of dimensions
MAX_LISTED = 3  # names per list in a message
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
PEFT = "base_model.model."


def is_shape(shape, dtype: np.dtype) -> bool:
    """Returns whether `shape` is a tuple of sizes that an array of this dtype can have.

    At most MAX_RANK non-negative integers; neither a size nor the bytes of the array (counted
    without the dimensions of size 0) reach 2**63.
    """
    integers = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    return (
        integers
        and len(shape) <= MAX_RANK
        and math.prod(n for n in shape if n) * dtype.itemsize < 2**63
    )


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The location of one tensor in a file.

    file: the file. offset: of its first byte. strides: in elements; None if it is C-contiguous.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Offset of the first byte after a contiguous tensor."""
        return self.offset + self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> np.ndarray:
        """Returns a read-only view of the memory-mapped file; data is read as elements are used."""
        size = math.prod(self.shape)
        if size == 0:
            return np.zeros(self.shape, self.dtype)
        if self.strides is None:
            return self._map(size).reshape(self.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        byte_strides = tuple(s * self.dtype.itemsize for s in self.strides)
        flat = self._map(span)
        return np.lib.stride_tricks.as_strided(flat, self.shape, byte_strides, writeable=False)

    def _map(self, count: int) -> np.ndarray:
        size = (count * self.dtype.itemsize,)
        try:
            raw = np.memmap(self.file, np.uint8, "r", self.offset, size)
        except ValueError as error:  # the file has become shorter since its header was read
            raise ValueError(f"{self.file} has changed since it was opened: {error}") from None
        # A plain ndarray, because every view of an np.memmap keeps that type and its warnings.
        return np.asarray(raw).view(self.dtype)


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """All tensors of a checkpoint folder by PyTorch name.

    `problems` maps kinds of inconsistencies between the files to tensor names. The conversion plan
    reports them together with those that it finds itself.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    problems: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The PyTorch names of all tensors."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the stored shape, in PyTorch's layout; reads no data."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the stored dtype (ml_dtypes.bfloat16 for bfloat16); reads no data."""
        return self.tensors[name].dtype

    def size(self, name: str) -> int:
        """Returns the number of bytes of the stored tensor; reads no data."""
        return self.dtype(name).itemsize * math.prod(self.shape(name))

    def read(self, name: str) -> np.ndarray:
        """Returns a read-only array in the stored dtype, backed by the memory-mapped file."""
        return self.tensors[name].read()


def abbreviate(names: Sequence[str]) -> str:
    """Joins the first names; for a longer list also states the prefix that all names share."""
    text = ", ".join(names[:MAX_LISTED])
    if len(names) <= MAX_LISTED:
        return text
    prefix = shared_prefix(names)
    return f"{text}, ..." + (f" (all begin with {prefix!r})" if prefix else "")


def shared_prefix(names: Sequence[str]) -> str:
    """Returns the longest prefix of whole components ('a.b.') that all names share."""
    # In sorted order every name lies between the first and the last, so it shares their prefix.
    first, last = min(names), max(names)
    pairs = zip(first.split(".")[:-1], last.split("."), strict=False)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return shorten_text("".join(f"{part}." for part, _ in shared))


def summarize_problems(problems: Mapping[str, Sequence[str]]) -> str:
    """Lists each kind of problem with its count and the first names affected; '' if none."""
    return "; ".join(
        f"{len(names)} {kind}: {abbreviate(names)}" for kind, names in problems.items() if names
    )


def wrapper_prefix(names: Iterable[str]) -> str:
    """Returns the wrapper prefix that all names share, such as 'module._orig_mod.', or ''."""
    names, prefix = list(names), ""
    while names:
        more = [w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not more:
            break
        prefix += more[0]
    return prefix


def hint(names: Sequence[str]) -> str:
    """Returns what to do about tensor names that the model does not have, or '' if unknown."""
    if len(names) and all(name.startswith(PEFT) for name in names):
        return (
            f"; PEFT added the prefix {PEFT!r}: merge its adapters (merge_and_unload) and save the "
            "model again"
        )
    return ""
