"""Models with one damaged weight."""

import contextlib
from collections.abc import Iterator

import numpy as np
from flax import nnx


@contextlib.contextmanager
def damaged(model: nnx.Module, path: str, value: float = np.nan, row: int = 0) -> Iterator[None]:
    """Sets the first weight of a row to a value, and restores it afterwards.

    The array keeps its shape and device without being committed to it, so that no program has to be
    compiled again, as would be the case after device_put.
    """
    parameter = model
    for name in path.split("."):
        parameter = parameter[int(name)] if name.isdigit() else getattr(parameter, name)
    old = parameter[...]
    parameter.set_value(old.at[(row, *[0] * (old.ndim - 1))].set(value))
    try:
        yield
    finally:
        parameter.set_value(old)
