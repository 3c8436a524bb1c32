"""A benchmark with two cases, which may take long or fail before the second."""

import time

from benchmarks.records import Record, spread

CASES = [dict(model="tiny", number=number, implementation="janus_jax") for number in (1, 2)]


def measure(record: Record, sleep: float = 0.0, error: str = "", note: str = "") -> None:
    record.describe("cpu", ("numpy", "no-such-package"))
    record.add(CASES[0], dict(value=1.0))
    time.sleep(sleep)
    if error:
        exception = ValueError(error)
        exception.add_note(note)  # as JAX does
        raise exception
    record.add(CASES[1], dict(value=spread([2.0, 4.0, 3.0])))
