"""What becomes of records that cannot be trained on: counted, listed, and too many stop the run."""

import collections
import json
import os
import threading
from pathlib import Path

from janus_jax.data.mixture import Loaded
from janus_jax.data.records import BadRecord

FIRST = 100  # records of a source before its part of bad ones is judged


class Skipped:
    """Leaves out bad records; a filter for the elements of mixture.stream.

    Each bad record is one line of the list, however often it comes by: {"source", "record",
    "reason", "detail"}. A list that is there already is gone on with.
    """

    def __init__(self, path: str | Path, most: float):
        """path: of the list, a JSONL file. most: the part of a source's records that may be bad."""
        self._path, self._most = Path(path), most
        self._seen: collections.Counter[str] = collections.Counter()
        self._left_out: dict[str, collections.Counter] = collections.defaultdict(
            collections.Counter
        )
        self._bad = _read(self._path)
        self._lock = threading.Lock()  # every stream has a thread of its own

    def __call__(self, loaded: Loaded) -> bool:
        """Whether to keep it. Raises ValueError once too many of a source are bad."""
        source, bad = loaded.source, loaded.example
        with self._lock:
            self._seen[source] += 1
            if not isinstance(bad, BadRecord):
                return True
            if (source, bad.where) not in self._bad:
                self._bad[source, bad.where] = bad.reason
                self._write(source, bad)
            self._left_out[source][bad.reason] += 1
            self._check(source)
        return False

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Bad records by source and reason."""
        found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        with self._lock:
            bad = list(self._bad.items())
        for (source, _), reason in bad:
            found[source][reason] += 1
        return {source: dict(reasons) for source, reasons in found.items()}

    def _write(self, source: str, bad: BadRecord) -> None:
        line = dict(source=source, record=bad.where, reason=bad.reason, detail=bad.detail)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _check(self, source: str) -> None:
        seen, bad = self._seen[source], self._left_out[source].total()
        if bad > self._most * max(seen, FIRST):
            raise ValueError(
                f"at most {self._most:.0%} of a source's records may be bad, got {bad} of {seen} "
                f"of {source} ({dict(self._left_out[source])}), listed in {self._path}"
            )


def _read(path: Path) -> dict[tuple[str, str], str]:
    """Reason by source and record; a last line that was cut short is cut off the file."""
    if not path.is_file():
        return {}
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + bool(whole))
    lines = [json.loads(line) for line in whole.split(b"\n") if line]
    return {(line["source"], line["record"]): line["reason"] for line in lines}
