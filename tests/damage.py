"""Models with one damaged weight."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx


@contextlib.contextmanager
def damaged(model: nnx.Module, path: str, value: float = np.nan, row: int = 0) -> Iterator[None]:
    """Puts a value into one weight, the first of a row, and the old one back in the end.

    Shapes and places stay what they are, so the programs are those of a whole model.
    """
    parameter = model
    for name in path.split("."):
        parameter = parameter[int(name)] if name.isdigit() else getattr(parameter, name)
    old = parameter[...]
    new = np.array(old)
    new[(row, *[0] * (new.ndim - 1))] = value
    parameter.set_value(jax.device_put(new, old.sharding))
    try:
        yield
    finally:
        parameter.set_value(old)
