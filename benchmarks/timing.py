"""Timing of functions on this machine."""

import time
from collections.abc import Callable, Sequence


def seconds_of(function: Callable[[], object]) -> float:
    """Returns the seconds that a call takes. The function must wait for its results."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def repeated(function: Callable[[], object], runs: int, budget: float = 20.0) -> list[float]:
    """Returns the seconds of each of several calls.

    runs: number of calls.
    budget: seconds after which no further call is started.
    """
    seconds: list[float] = []
    while len(seconds) < runs and sum(seconds) < budget:
        seconds.append(seconds_of(function))
    return seconds


def rate_between(marks: Sequence[tuple[int, float]]) -> float:
    """Returns the mean seconds per step between the first and the last of the marks.

    marks: at least two pairs of the number of steps done and the time.

    Raises:
        ValueError: fewer than two marks.
    """
    if len(marks) < 2:
        raise ValueError(f"expected at least two marks, got {len(marks)}")
    (first, start), (last, end) = marks[0], marks[-1]
    return (end - start) / (last - first)
