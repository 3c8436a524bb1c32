"""The folder of shards that tokenize_images writes, from which an interrupted run resumes."""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_jax.data.records import Record
from janus_jax.data.skipped import counts_text
from janus_jax.data.writers import SUFFIXES, write_records
from janus_jax.paths import atomic_write, check_local, locked, read_json, write_file

_REPORTS = ".tokenize_images"
_MANIFEST = "manifest.json"
_LOCK = "lock"
_SKIPPED = "skipped.jsonl"  # in a hidden folder, so that a source of JSONL files ignores it

SkippedEntry = dict[str, str]  # record (its location), reason and detail


@dataclasses.dataclass(frozen=True)
class Shards:
    """The output folder: shards, and the reports of the finished ones in a hidden folder.

    format: the format of the shards, a key of data.sources.FORMATS. shard_size: number of source
    records for each shard.
    """

    format: str
    folder: Path
    shard_size: int

    def check(self) -> None:
        """Raises ValueError if the path is not local, or the folder contains other files."""
        check_local("--output", self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output must be a folder, got the file {self.folder}")
        if not (self.folder / _REPORTS / _MANIFEST).is_file() and not self._has_no_shard():
            rule = "--output must be a new folder or that of an interrupted run"
            raise ValueError(f"{rule}, got {self.folder}, which has other files")

    def lock(self) -> contextlib.AbstractContextManager:
        """Locks the folder. Raises ValueError if another process has locked it."""
        return locked(self.folder, f"{_REPORTS}/{_LOCK}")

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest of a new run, or compares it with that of an interrupted one.

        Args:
            manifest: the settings that determine the contents of the shards.
        Raises:
            ValueError: the interrupted run had other settings.
        """
        path = self.folder / _REPORTS / _MANIFEST
        if self._has_no_shard():  # then the settings may differ from the last run
            for temporary in path.parent.glob(".*"):  # files of a killed run
                temporary.unlink()
            _write_json(path, manifest)
        previous = read_json(path)
        for name in {**previous, **manifest}:
            if manifest.get(name) != previous.get(name):
                rule = f"{self.folder} was started with {name} {previous.get(name)}"
                got = f"got {manifest.get(name)}"
                raise ValueError(f"{rule}, which must not change, {got}; use another folder")

    def _has_no_shard(self) -> bool:
        """Returns whether the folder has only files that a run writes before its first shard.

        Temporary files, which a killed run leaves behind, count as such.
        """
        reports = self.folder / _REPORTS
        names = [path.name.removeprefix(".") for path in reports.glob("*")]
        is_setup = all(name.startswith((_MANIFEST, _SKIPPED, _LOCK)) for name in names)
        return is_setup and set(self.folder.glob("*")) <= {reports}

    def report(self, shard: int) -> dict[str, Any] | None:
        """Returns the report of a finished shard (see write), or None if it is not finished.

        Raises ValueError if the report is invalid.
        """
        path = self._report_path(shard)
        if not path.is_file():
            return None
        report = read_json(path)
        if not _is_report(report):
            rule = "must contain the integers encoded and copied, and the list skipped"
            raise ValueError(f"{path} {rule}; delete it to write its shard again")
        return report

    def write(
        self, shard: int, records: Sequence[Record], encoded: int, skipped: Sequence[SkippedEntry]
    ) -> None:
        """Writes a shard, and then its report.

        Args:
            shard: number of the shard, from 0.
            records: the records of the shard, with tokens.
            encoded: how many of them had an image that was encoded; the others were copied.
            skipped: the skipped records.
        """
        path = self.folder
        if self.format in SUFFIXES:
            path = self.folder / f"shard-{shard:05d}{SUFFIXES[self.format]}"
            for temporary in self.folder.glob(f".{path.name}.*"):  # files of a killed run
                temporary.unlink()
        write_records(self.format, path, records, first=shard * self.shard_size)
        report = dict(encoded=encoded, copied=len(records) - encoded, skipped=skipped)
        _write_json(self._report_path(shard), report)

    def list_skipped(self, skipped: Sequence[SkippedEntry]) -> Path:
        """Writes the list of skipped records, or deletes an old one if there are none.

        Returns the path of the list.
        """
        path = self.folder / _REPORTS / _SKIPPED
        if not skipped:
            path.unlink(missing_ok=True)
            return path
        with atomic_write(path) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in skipped)
        return path

    def finish(self, shards: int, skipped: Sequence[SkippedEntry]) -> str:
        """Lists the skipped records and returns a one-line summary of all shards."""
        reports = [self.report(shard) for shard in range(shards)]
        encoded, copied = (sum(one[name] for one in reports) for name in ("encoded", "copied"))
        line = f"{self.folder}: {encoded} images tokenized, {copied} records copied"
        listed = self.list_skipped(skipped)
        if not skipped:
            return f"{line}, 0 skipped"
        counts = counts_text(by_reason(skipped))
        return f"{line}, {len(skipped)} skipped ({counts}), listed in {listed}"

    def _report_path(self, shard: int) -> Path:
        return self.folder / _REPORTS / f"{shard:05d}.json"


def _is_report(report: Mapping[str, Any]) -> bool:
    counts, skipped = [report.get("encoded"), report.get("copied")], report.get("skipped")
    return (
        all(type(count) is int for count in counts)
        and isinstance(skipped, list)
        and all(isinstance(entry, dict) for entry in skipped)
        and all(isinstance(entry.get("reason"), str) for entry in skipped)
    )


def _write_json(path: Path, value: Mapping) -> None:
    write_file(path, json.dumps(value, indent=2).encode() + b"\n")


def by_reason(skipped: Sequence[SkippedEntry]) -> collections.Counter[str]:
    """Returns the number of skipped records by reason."""
    return collections.Counter(entry["reason"] for entry in skipped)
