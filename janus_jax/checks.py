"""Checks of user-supplied values, and short forms of values for one-line error messages."""

import numbers
import reprlib
from collections.abc import Sequence

FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
FLOAT32_MIN_NORMAL = 2.0**-126  # devices may flush smaller numbers to 0
MAX_SHOWN = 80  # characters of one value in a message
_END_SHOWN = 24  # of these, at the end of a shortened text: a file name, the end of a URL


class _Shortener(reprlib.Repr):
    """A repr with bounded time and length for values of any size and nesting."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, MAX_SHOWN, MAX_SHOWN

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 256:  # repr raises for more than 4300 digits
            return f"an integer of {value.bit_length()} bits"
        return repr(value)

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(bytes(value[:MAX_SHOWN])) + "..." * (len(value) > MAX_SHOWN)

    repr_bytearray = repr_bytes


_SHORTENER = _Shortener()


def shorten(value) -> str:
    """Returns the repr of a value, shortened to one line of at most 80 characters."""
    return shorten_text(_SHORTENER.repr(value))


def shorten_text(text: str) -> str:
    """Returns a text without quotes, shortened to one line of at most 80 characters."""
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN - _END_SHOWN - 3]}...{text[-_END_SHOWN:]}"
    return " ".join(text.split())


def error_text(error: BaseException) -> str:
    """Returns the message of an exception in one line, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def _to_python(value):
    """Converts a NumPy scalar or a 0-d array of any library; returns other values unchanged."""
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


def _describe(value) -> str:
    shape = getattr(value, "shape", None)
    return f"an array of shape {tuple(shape)}" if shape else shorten(value)


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(name: str, value) -> float:
    """Converts a number, a NumPy scalar or a 0-d array to a float.

    Raises:
        ValueError: the value is not a number, or not finite in float32.
    """
    value = _to_python(value)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite number, got {_describe(value)}")
    return float(value)


def check_float32(name: str, value) -> float:
    """Converts a number as check_number does.

    Raises:
        ValueError: the value is not finite in float32, or underflows to 0 there.
    """
    number = check_number(name, value)
    if number != 0 and abs(number) < FLOAT32_MIN_NORMAL:
        raise ValueError(f"{name} must not underflow in float32, got {_describe(value)}")
    return number


def check_count(name: str, value) -> int:
    """Converts an integer, a NumPy scalar or a 0-d array to an int.

    Raises:
        ValueError: the value is not an integer in [1, 2**31).
    """
    value = _to_python(value)
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {_describe(value)}")
    if value >= 2**31:  # compiled programs count in int32
        raise ValueError(f"{name} must be below 2**31, got {shorten(value)}")
    return int(value)


def check_optional_count(name: str, value) -> int | None:
    """Like check_count, but returns None for None."""
    return None if value is None else check_count(name, value)


def check_not_empty(name: str, values: Sequence) -> None:
    """Raises ValueError if there are no values."""
    if not len(values):
        raise ValueError(f"{name} must not be empty")


def check_seed(seed) -> int:
    """Converts a random seed (an integer, a NumPy scalar or a 0-d array) to an int.

    Raises:
        ValueError: the seed is not an integer in [0, 2**64).
    """
    seed = _to_python(seed)
    if not _is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {_describe(seed)}")
    return int(seed)
