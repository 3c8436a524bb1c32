"""What becomes of records that cannot be trained on: counted, listed, and too many stop the run."""

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
    from janus_jax.data.mixture import Loaded  # with grain, which takes seconds to import

Counts = Mapping[str, int]  # of bad records, by reason


class Skipped:
    """Leaves out bad records; a filter for the elements of mixture.stream.

    Each bad record counts once and is one line of the list, however often it comes by: {"source",
    "record", "reason", "detail"}. A list that is there already is gone on with.

    Too many are bad once more than the part `most` of all records of a source are known to be. So
    that a large source that is broken stops the run at once, they are also too many if records come
    in random order and those met since this start are more than chance makes of that part
    (_most_by_chance). Where several hosts read, each judges by what it met itself.
    """

    def __init__(self, path: str | Path, most: float, records: Mapping[str, int]):
        """path: of the list, a JSONL file. most: the part of a source's records that may be bad.

        records: how many each source has, by name.
        """
        self._path, self._most, self._records = Path(path), most, records
        self._seen: collections.Counter[str] = collections.Counter()  # since this start, as is met
        self._met: dict[str, dict[str, str]] = collections.defaultdict(dict)  # reason by record
        self._listed = _read(self._path)
        self._lock = threading.Lock()  # every stream has a thread of its own

    def __call__(self, loaded: "Loaded") -> bool:
        """Whether to keep it. Raises ValueError once too many of a source are bad."""
        source, bad = loaded.source, loaded.example
        with self._lock:
            self._seen[source] += 1
            if not isinstance(bad, BadRecord):
                return True
            self._met[source][bad.where] = bad.reason
            if bad.where not in self._listed[source]:
                self._listed[source][bad.where] = bad.reason
                self._write(source, bad)
            self._check(source)
        return False

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Bad records by source and reason."""
        with self._lock:
            return {source: dict(_by_reason(bad)) for source, bad in self._listed.items()}

    def forget(self) -> None:
        """Begins the list anew, for a run that does so: what is still bad comes by again."""
        with self._lock:
            self._listed.clear()
            self._path.unlink(missing_ok=True)

    def _write(self, source: str, bad: BadRecord) -> None:
        line = dict(source=source, record=bad.where, reason=bad.reason, detail=bad.detail)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with os_errors_of(self._path), self._path.open("ab", buffering=0) as file:
            write_all(file, json.dumps(line).encode() + b"\n")

    def _check(self, source: str) -> None:
        seen, records = self._seen[source], self._records[source]
        known, met = self._listed[source], self._met[source]
        of = f"the {records} of {source or 'the mixture'}"
        listed = f"{self._path} (delete it once they are mended)"
        if too_many(len(known), records, self._most):
            raise refusal(self._most, _by_reason(known), of, listed)
        if len(met) > _most_by_chance(self._most * seen):
            raise refusal(self._most, _by_reason(met), f"{seen} read of {of}", listed)


def too_many(bad: int, records: int, most: float) -> bool:
    """Whether more than the part `most` of a source's records are bad."""
    return bad / records > most  # most * records may be a rounding less than an integer


def refusal(most: float, bad: Counts, of: str, listed: str | Path) -> ValueError:
    """The error for too many bad ones. of: which records there were. listed: where they are."""
    rule = f"at most {most:g} of a source's records may be bad (max_bad)"
    return ValueError(f"{rule}, got {sum(bad.values())} of {of} ({told(bad)}), listed in {listed}")


def told(bad: Counts) -> str:
    """"2 malformed, 1 missing file"."""
    most_first = sorted(bad.items(), key=lambda one: -one[1])
    return ", ".join(f"{number} {reason}" for reason, number in most_first)


def _most_by_chance(expected: float) -> float:
    """Five standard deviations above what is expected, and 10 so that it also holds for a few.

    A source with just as many bad ones as it may have has more in fewer than one of ten thousand
    runs. Where all are bad and 1 % may be, the 12th stops the run.
    """
    return expected + 5 * math.sqrt(expected) + 10


def _by_reason(bad: Mapping[str, str]) -> Counts:
    """bad: reason by record."""
    return collections.Counter(bad.values())


def _read(path: Path) -> dict[str, dict[str, str]]:
    """Reason by source and by record; a last line that was cut short is cut off the file.

    Raises ValueError if another line is not one of this list, or if it is no regular file.
    """
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    if not path.exists():
        return found
    file_size(path)  # a FIFO would wait for ever to be opened
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + bool(whole))
    for number, line in enumerate(whole.split(b"\n"), 1):
        if line:
            source, record, reason = _fields(line, f"{path}, line {number}")
            found[source][record] = reason
    return found


def _fields(line: bytes, where: str) -> tuple[str, str, str]:
    """The source, record and reason of a line."""
    try:
        bad = json.loads(line)
        fields = bad["source"], bad["record"], bad["reason"]
    except (ValueError, TypeError, KeyError, RecursionError):
        fields = (None,)
    if not all(isinstance(field, str) for field in fields):
        rule = "must be a JSON object with the texts source, record and reason"
        raise ValueError(f"{where}: {rule}; remove this line, or delete the file to begin anew")
    return fields
