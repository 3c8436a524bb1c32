"""A benchmark with two cases, which may take long or fail before the second."""

import time

from benchmarks.records import Record, spread

CASES = [dict(model="tiny", number=number, implementation="janus_jax") for number in (1, 2)]


def measure(record: Record, sleep: float = 0.0, error: str | None = None) -> None:
    record.describe("cpu", ("numpy", "no-such-package"))
    record.add(CASES[0], dict(value=1.0))
    time.sleep(sleep)
    if error:
        raise ValueError(error)
    record.add(CASES[1], dict(value=spread([2.0, 4.0, 3.0])))
