"""Models with one damaged weight."""

import contextlib
from collections.abc import Iterator

import numpy as np
from flax import nnx


@contextlib.contextmanager
def damaged(model: nnx.Module, path: str, value: float = np.nan, row: int = 0) -> Iterator[None]:
    """Puts a value into one weight, the first of a row, and the old one back in the end.

    Shapes and places stay what they are, so the programs are those of a whole model: an array that
    device_put commits to its place would have others compiled.
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
