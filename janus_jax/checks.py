"""What a value that a user gives must be; told in one line otherwise."""

import numbers
from collections.abc import Sequence

LARGEST = float.fromhex("0x1.fffffep+127")  # of float32


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(name: str, value) -> None:
    """Raises ValueError unless the value is a number that is finite in float32."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST:
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_count(name: str, value) -> None:
    """Raises ValueError unless the value is a whole number in [1, 2**31)."""
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if value >= 2**31:  # devices count in int32
        raise ValueError(f"{name} must be below 2**31, got {value!r}")


def check_not_empty(name: str, values: Sequence) -> None:
    """Raises ValueError where there are no values."""
    if not len(values):
        raise ValueError(f"{name} must hold at least one, got none")


def check_seed(seed) -> None:
    """Raises ValueError unless the seed is a whole number in [0, 2**32)."""
    if not _is_int(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2**32), got {seed!r}")
