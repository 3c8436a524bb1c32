"""Skips, counts and lists bad records, and stops the run if there are too many."""

import collections
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from janus_jax.data.records import BadRecord
from janus_jax.paths import file_size, os_errors_of, write_all

if TYPE_CHECKING:
    from janus_jax.data.mixture import Loaded  # imports Grain, which takes seconds

Counts = Mapping[str, int]  # number of bad records by reason


class Skipped:
    """A filter for the elements of mixture.mixed_examples that skips bad records.

    A bad record is counted once and listed on one line, however often it is read. A line of the
    list is a JSON object with the fields "source", "record", "reason" and "detail". If the list
    already exists, new lines are appended to it.

    There are two limits for each source:

    * At most the fraction max_bad of all its records may be listed as bad.
    * Of the records read since this process started, at most the fraction max_bad plus a margin for
      chance may be bad (see _max_by_chance). This limit stops the run early if a large source is
      broken. It assumes that records come in random order.

    If several hosts read a source, each applies the limits to the records that it has read itself.
    """

    def __init__(self, path: str | Path, max_bad: float, num_records: Mapping[str, int]):
        """Reads the list if it exists.

        Args:
            path: the list of bad records, a JSONL file.
            max_bad: maximum fraction of a source's records that may be bad.
            num_records: number of records of each source, by its name.
        """
        self._path, self._max_bad, self._num_records = Path(path), max_bad, num_records
        # Records read since the process started, including repeated ones.
        self._num_read: collections.Counter[str] = collections.Counter()
        # For each source, the reason by bad record: those read by this process, and those listed.
        self._read_bad: dict[str, dict[str, str]] = collections.defaultdict(dict)
        self._listed = _read_list(self._path)
        self._lock = threading.Lock()  # each stream calls the filter from its own thread

    def __call__(self, loaded: "Loaded") -> bool:
        """Returns whether to keep an element. Raises ValueError if too many records are bad."""
        source, bad = loaded.source, loaded.example
        with self._lock:
            self._num_read[source] += 1
            if not isinstance(bad, BadRecord):
                return True
            self._read_bad[source][bad.where] = bad.reason
            if bad.where not in self._listed[source]:
                self._listed[source][bad.where] = bad.reason
                self._append(source, bad)
            self._check(source)
        return False

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of bad records by source and reason."""
        with self._lock:
            return {source: dict(_by_reason(bad)) for source, bad in self._listed.items()}

    def forget(self) -> None:
        """Deletes the list, for a run that starts from scratch and will find bad records again."""
        with self._lock:
            self._listed.clear()
            self._path.unlink(missing_ok=True)

    def _append(self, source: str, bad: BadRecord) -> None:
        line = dict(source=source, record=bad.where, reason=bad.reason, detail=bad.detail)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with os_errors_of(self._path), self._path.open("ab", buffering=0) as file:
            write_all(file, json.dumps(line).encode() + b"\n")

    def _check(self, source: str) -> None:
        num_read, num_records = self._num_read[source], self._num_records[source]
        listed, read_bad = self._listed[source], self._read_bad[source]
        population = f"the {num_records} records of {source or 'the mixture'}"
        where = f"{self._path}; repair them and delete the list, or raise max_bad"
        if too_many(len(listed), num_records, self._max_bad):
            raise too_many_error(self._max_bad, _by_reason(listed), population, where)
        if len(read_bad) > _max_by_chance(self._max_bad * num_read):
            population = f"{num_read} read so far of {population}"
            raise too_many_error(self._max_bad, _by_reason(read_bad), population, where)


def too_many(num_bad: int, num_records: int, max_bad: float) -> bool:
    """Returns whether more than the fraction max_bad of a source's records are bad."""
    # Not num_bad > max_bad * num_records: the product may be rounded to less than an integer.
    return num_bad / num_records > max_bad


def too_many_error(max_bad: float, bad: Counts, population: str, where: str | Path) -> ValueError:
    """Returns the error for too many bad records.

    Args:
        max_bad: the maximum fraction.
        bad: numbers of bad records by reason.
        population: the records among which they were found, for the message.
        where: the file that lists them and what to do, for the message.
    """
    number = f"{sum(bad.values())} of {population} are bad ({counts_text(bad)})"
    rule = f"more than the fraction max_bad={max_bad:g} allows"
    return ValueError(f"{number}, {rule}; they are listed in {where}")


def counts_text(bad: Counts) -> str:
    """Formats numbers of bad records by reason, as "2 malformed, 1 missing file"."""
    descending = sorted(bad.items(), key=lambda item: -item[1])
    return ", ".join(f"{number} {reason}" for reason, number in descending)


def _max_by_chance(expected: float) -> float:
    """Returns 5 standard deviations above the expected number, plus 10 for small numbers.

    If exactly the fraction max_bad of the records is bad, fewer than 1 in 10 000 runs exceed this
    number. If all records are bad and max_bad is 0.01, the 12th record stops the run.
    """
    return expected + 5 * math.sqrt(expected) + 10


def _by_reason(bad: Mapping[str, str]) -> Counts:
    """Counts bad records by reason, given the reason by record."""
    return collections.Counter(bad.values())


def _read_list(path: Path) -> dict[str, dict[str, str]]:
    """Reads the reasons by source and record. A truncated last line is removed from the file.

    Raises:
        ValueError: another line is invalid, or the path is not a regular file.
    """
    reasons: dict[str, dict[str, str]] = collections.defaultdict(dict)
    if not path.exists():
        return reasons
    file_size(path)  # raises for a FIFO, as opening one would block forever
    complete, _, truncated = path.read_bytes().rpartition(b"\n")
    if truncated:
        os.truncate(path, len(complete) + bool(complete))
    for number, line in enumerate(complete.split(b"\n"), 1):
        if line:
            source, record, reason = _parse_line(line, f"{path}, line {number}")
            reasons[source][record] = reason
    return reasons


def _parse_line(line: bytes, where: str) -> tuple[str, str, str]:
    """Returns the source, record and reason of a line. where: its location, for the message."""
    try:
        bad = json.loads(line)
        fields = bad["source"], bad["record"], bad["reason"]
    except (ValueError, TypeError, KeyError, RecursionError):
        fields = (None,)
    if not all(isinstance(field, str) for field in fields):
        rule = "must be a JSON object with the strings source, record and reason"
        raise ValueError(f"{where}: {rule}; remove the line, or delete the file to start a new one")
    return fields
