"""What a value that a user gives must be; told in one line otherwise."""

import numbers
import reprlib
from collections.abc import Sequence

FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
FLOAT32_MIN_NORMAL = 2.0**-126  # devices may flush smaller numbers to 0
MOST_SHOWN = 80  # characters of one value in a message
_END_SHOWN = 24  # of them, after the cut: the name of a file, the end of a URL


class _Shortener(reprlib.Repr):
    """repr whose time and length are bounded, however large or nested the value is."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, MOST_SHOWN, MOST_SHOWN

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 256:  # Python refuses to write more than 4300 digits
            return f"an integer of {value.bit_length()} bits"
        return repr(value)

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(bytes(value[:MOST_SHOWN])) + "..." * (len(value) > MOST_SHOWN)

    repr_bytearray = repr_bytes


_SHORTENER = _Shortener()


def shorten(value) -> str:
    """The repr of a value that a user gave, for a message: one line of at most 80 characters."""
    return shorten_text(_SHORTENER.repr(value))


def shorten_text(text: str) -> str:
    """A text that a user gave, as it is but in one line of at most 80 characters."""
    if len(text) > MOST_SHOWN:
        text = f"{text[: MOST_SHOWN - _END_SHOWN - 3]}...{text[-_END_SHOWN:]}"
    return " ".join(text.split())


def error_text(error: BaseException) -> str:
    """What an error says, in one line, or its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _to_python(value):
    """What a NumPy scalar or a 0-d array of any library holds; other values as they are."""
    holds_one = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if holds_one else value


def _shown(value) -> str:
    shape = getattr(value, "shape", None)
    return f"an array of shape {tuple(shape)}" if shape else shorten(value)


def _is_int(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(name: str, value) -> float:
    """The value as a Python number: a number, a NumPy scalar or a 0-d array.

    Raises:
        ValueError: it is not a number, or not finite in float32.
    """
    value = _to_python(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{name} must be a finite number, got {_shown(value)}")
    return float(value)


def check_float32(name: str, value) -> float:
    """The value as check_number gives it.

    Raises:
        ValueError: it is not finite in float32, or 0 there without being 0.
    """
    number = check_number(name, value)
    if number != 0 and abs(number) < FLOAT32_MIN_NORMAL:
        raise ValueError(f"{name} must not vanish in float32, got {_shown(value)}")
    return number


def check_count(name: str, value) -> int:
    """The value as a Python integer: an integer, a NumPy scalar or a 0-d array.

    Raises:
        ValueError: it is no integer in [1, 2**31).
    """
    value = _to_python(value)
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {_shown(value)}")
    if value >= 2**31:  # devices count in int32
        raise ValueError(f"{name} must be below 2**31, got {shorten(value)}")
    return int(value)


def check_optional_count(name: str, value) -> int | None:
    """As check_count; None stays None."""
    return None if value is None else check_count(name, value)


def check_not_empty(name: str, values: Sequence) -> None:
    """Raises ValueError where there are no values."""
    if not len(values):
        raise ValueError(f"{name} must hold at least one, got none")


def check_seed(seed) -> int:
    """The seed as a Python integer: an integer, a NumPy scalar or a 0-d array.

    Raises:
        ValueError: it is no integer in [0, 2**64).
    """
    seed = _to_python(seed)
    if not _is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {_shown(seed)}")
    return int(seed)
