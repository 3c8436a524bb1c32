"""A checkpoint file seen as named byte ranges: nothing is read until a tensor is asked for."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_RANK = 64  # of an array in NumPy


def is_shape(shape, dtype: np.dtype) -> bool:
    """Whether an array can have this shape: a tuple of integers that are not too large."""
    sizes = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    return (
        sizes
        and len(shape) <= MAX_RANK
        and math.prod(n for n in shape if n) * dtype.itemsize < 2**63
    )


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `strides` (in elements) is None for a C-contiguous one."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Offset of the byte after a contiguous one."""
        return self.offset + self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> np.ndarray:
        """Read-only view of the file; pages are touched when elements are used."""
        size = math.prod(self.shape)
        if size == 0:
            return np.zeros(self.shape, self.dtype)
        if self.strides is None:
            return self._map(size).reshape(self.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        steps = tuple(s * self.dtype.itemsize for s in self.strides)
        flat = self._map(span)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)

    def _map(self, count: int) -> np.ndarray:
        size = (count * self.dtype.itemsize,)
        try:
            raw = np.memmap(self.file, np.uint8, "r", self.offset, size)
        except ValueError as error:  # it was longer when it was opened
            raise ValueError(f"{self.file} has changed since it was opened: {error}") from None
        # A plain ndarray: np.memmap would keep its own type (and its warnings) through every view.
        return np.asarray(raw).view(self.dtype)


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Every tensor of a checkpoint folder by its PyTorch name.

    `faults` holds what the files contradict each other in (kind -> names); the conversion plan
    reports them together with its own findings.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    faults: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """PyTorch names of all tensors."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored, in PyTorch's layout; reads nothing."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype as stored (ml_dtypes.bfloat16 for bfloat16); reads nothing."""
        return self.tensors[name].dtype

    def size(self, name: str) -> int:
        """Bytes of a tensor as stored; reads nothing."""
        return self.dtype(name).itemsize * math.prod(self.shape(name))

    def read(self, name: str) -> np.ndarray:
        """Read-only array (ml_dtypes.bfloat16 where stored so), backed by the file."""
        return self.tensors[name].read()
