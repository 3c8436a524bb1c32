"""python -m janus_jax.commands.tokenize_images: precomputes the tokens of images to generate.

Training on precomputed tokens does not run the image tokenizer. Every generation record is written
with `indices` in place of its image. Other records, and those that already have indices, are
copied.

The output is a folder of shards with the same number of source records each (for class_folder, a
folder of files named after the numbers of the records). For each finished shard there is a report
in the folder .tokenize_images, and an interrupted run resumes after the last one. Skipped records
are listed in that folder, too.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_jax import checks
from janus_jax.commands.program import (
    OneLineParser,
    device_memory_errors,
    one_line_errors,
    set_up_program,
)
from janus_jax.commands.progress import Progress
from janus_jax.data.reading import Source, prepare_image
from janus_jax.data.records import BadRecord, Record
from janus_jax.data.skipped import counts_text, too_many, too_many_error
from janus_jax.data.sources import open_source
from janus_jax.data.writers import SUFFIXES, write_records
from janus_jax.paths import atomic_write, check_local, locked, write_file
from janus_jax.processing.images import preprocess_generation
from janus_jax.processing.json_files import read_json
from janus_jax.shapes.source import ALL_FORMATS

SkippedEntry = dict[str, str]  # record (its location), reason and detail

if TYPE_CHECKING:
    from janus_jax.models.vq import VQ

_REPORTS = ".tokenize_images"
_MANIFEST = "manifest.json"
_LOCK = "lock"
_SKIPPED = "skipped.jsonl"  # in a hidden folder, so that a source of JSONL files ignores it
_THREADS = 16  # threads that read and decode images while the device encodes others

_EXAMPLE = """example:
  python -m janus_jax.commands.tokenize_images --model deepseek-ai/Janus-Pro-1B \\
      --source tar:photos --output arrayrecord:photos_tokens
"""


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "tokenize_images",
        prog="python -m janus_jax.commands.tokenize_images",
        description="Replace the images of generation records by their tokens. "
        "To resume an interrupted run, run the same command again.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, formats = parser.add_argument, ", ".join(ALL_FORMATS)
    location = dict(required=True, type=_format_and_path)
    add("--model", required=True, metavar="PATH", help="checkpoint folder or Hugging Face hub id")
    source_help = f"records to read; FORMAT is one of {formats}"
    add("--source", **location, metavar="FORMAT:PATH", help=source_help)
    output_help = "folder to write the records with tokens to; FORMAT as above except scenes"
    add("--output", **location, metavar="FORMAT:FOLDER", help=output_help)
    batch_help = "number of images to encode at once (default: 64)"
    add("--batch_size", type=int, default=64, metavar="N", help=batch_help)
    shard_help = "number of source records per shard (default: 1000)"
    add("--shard_size", type=int, default=1000, metavar="N", help=shard_help)
    max_bad_help = "maximum fraction of the records that may be skipped (default: 0.05)"
    add("--max_bad", type=float, default=0.05, metavar="FRACTION", help=max_bad_help)
    root_help = "folder that image paths are relative to (jsonl; default: that of the file)"
    add("--image_root", metavar="FOLDER", help=root_help)
    names_help = 'text file with lines "FOLDER NAME, ..." (class_folder; default: folder names)'
    add("--class_names", metavar="FILE", help=names_help)
    add("--count", type=int, metavar="N", help="number of records (scenes; default: 100000)")
    add("--seed", type=int, metavar="N", help="random seed (scenes; default: 0)")
    return parser


def _format_and_path(text: str) -> tuple[str, Path]:
    format, colon, path = text.partition(":")
    if not (format in ALL_FORMATS and colon and path):
        rule = f"must be FORMAT:PATH, with FORMAT one of {', '.join(ALL_FORMATS)}"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    return format, Path(path)


class Encoder:
    """Encodes images in batches: add them one by one, then get all tokens at once.

    All batches have the same size, so one program is compiled. The next batch is collected while
    the device encodes the previous one.
    """

    def __init__(self, vq: "VQ", image_size: int, batch_size: int):
        self.image_size = image_size
        self._vq, self._batch_size = vq, batch_size
        self._pending: list[np.ndarray] = []
        self._encoded: list[Any] = []

    def add(self, pixels: np.ndarray) -> None:
        """Adds an image, float32[S, S, 3] in [-1, 1]."""
        self._pending.append(pixels)
        if len(self._pending) == self._batch_size:
            self._encode()

    def finish(self) -> np.ndarray:
        """Returns the tokens of all images added since the last call, int32[N, T], in order.

        Raises ValueError if latents of the image tokenizer are NaN or infinite.
        """
        from janus_jax.generation.codec import check_encoded

        number = len(self._encoded) * self._batch_size + len(self._pending)
        if self._pending:
            self._encode()
        encoded, self._encoded = self._encoded, []
        indices = np.concatenate([np.asarray(part) for part in encoded] or [[]])[:number]
        return check_encoded(indices, self._vq)

    def _encode(self) -> None:
        from janus_jax.generation.codec import encode_pixels

        if self._encoded:  # wait, so that batches do not queue up in memory
            self._encoded[-1].block_until_ready()
        shape = self._batch_size, self.image_size, self.image_size, 3
        batch = np.zeros(shape, np.float32)
        batch[: len(self._pending)] = self._pending
        self._pending = []
        self._encoded.append(encode_pixels(self._vq, batch))


def _read(
    source: Source, numbers: range, image_size: int
) -> Iterator[tuple[Record | BadRecord, np.ndarray | None]]:
    """Returns the records with these numbers, and the pixels of those that must be encoded."""
    import grain  # takes seconds to import

    prepare = functools.partial(preprocess_generation, size=image_size)

    def read(number: int) -> tuple[Record | BadRecord, np.ndarray | None]:
        record = source[number]
        if isinstance(record, BadRecord) or record.kind != "generation" or not record.images:
            return record, None
        try:
            return record, prepare_image(record.images[0], prepare)
        except BadRecord as bad:
            return BadRecord(bad.reason, bad.detail, record.where), None

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(dataset.to_iter_dataset(options))


def tokenize(
    source: Source, numbers: range, encoder: Encoder
) -> tuple[list[Record], int, list[BadRecord]]:
    """Tokenizes the records with these numbers.

    Returns the records with tokens, the number of encoded images, and the skipped records.
    """
    records, encoded, bad = [], [], []  # encoded: positions in records
    for record, pixels in _read(source, numbers, encoder.image_size):
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        if pixels is not None:
            encoded.append(len(records))
            encoder.add(pixels)
        records.append(record)
    for position, indices in zip(encoded, encoder.finish(), strict=True):
        records[position] = dataclasses.replace(records[position], images=(), indices=indices)
    return records, len(encoded), bad


@dataclasses.dataclass(frozen=True)
class Output:
    """A folder of shards, and the reports of the finished ones."""

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
        counts = counts_text(_by_reason(skipped))
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


def _fingerprint(vq: "VQ") -> str:
    """Returns a hash of the parameters of an image tokenizer."""
    import jax

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(vq):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _source_options(args: argparse.Namespace) -> dict[str, str | int]:
    names = ("image_root", "class_names", "count", "seed")
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def run(args: argparse.Namespace) -> str:
    """Runs the command and returns a one-line summary."""
    from janus_jax import sharding
    from janus_jax.generation import compile_cache
    from janus_jax.interop.folders import find_folder
    from janus_jax.interop.load import load_vq, open_folder

    sharding.check_devices()
    for name in ("batch_size", "shard_size"):
        checks.check_count(f"--{name}", getattr(args, name))
    if not 0 <= args.max_bad < 1:
        raise ValueError(f"--max_bad must be at least 0 and below 1, got {args.max_bad}")
    options = _source_options(args)
    format, path = args.source
    source = open_source(format, path, formats=ALL_FORMATS, **options)
    output = Output(*args.output, args.shard_size)
    output.check()
    compile_cache.enable()
    model = open_folder(find_folder(args.model))
    vq = load_vq(model)
    manifest = {
        "model": f"{model.path.resolve().name} with the image tokenizer {_fingerprint(vq)}",
        "source": f"{format}:{path.resolve()}",
        "records": len(source),
        **options,
        "format": output.format,
        "shard_size": output.shard_size,
    }
    encoder = Encoder(vq, model.cfg.image_size, args.batch_size)
    # The estimated time left ignores the first shard, which includes compilation.
    with output.lock(), Progress("tokenizing", " records", warm_up=1) as progress:
        output.start(manifest)
        return _tokenize_all(source, encoder, output, args.max_bad, progress)


def _tokenize_all(
    source: Source, encoder: Encoder, output: Output, max_bad: float, progress: Progress
) -> str:
    starts, skipped = range(0, len(source), output.shard_size), []
    for shard, start in enumerate(starts):
        numbers = range(start, min(start + output.shard_size, len(source)))
        if (report := output.report(shard)) is not None:
            skipped += report["skipped"]
            continue
        with device_memory_errors("while encoding; a smaller --batch_size needs less"):
            records, encoded, bad = tokenize(source, numbers, encoder)
        skipped += (entries := [_skipped_entry(record) for record in bad])
        _check_skipped(output, skipped, len(source), max_bad)
        output.write(shard, records, encoded, entries)
        progress(numbers.stop, len(source))
    _check_skipped(output, skipped, len(source), max_bad)
    return output.finish(len(starts), skipped)


def _skipped_entry(bad: BadRecord) -> SkippedEntry:
    return dict(record=bad.where, reason=bad.reason, detail=bad.detail)


def _by_reason(skipped: Sequence[SkippedEntry]) -> collections.Counter[str]:
    return collections.Counter(entry["reason"] for entry in skipped)


def _check_skipped(
    output: Output, skipped: Sequence[SkippedEntry], num_records: int, max_bad: float
) -> None:
    """Raises ValueError if more than max_bad of all records of the source are skipped.

    Unlike in training, the fraction among the records read so far does not matter: records are read
    in the order of the files, in which bad records are often adjacent, and skipping one is cheap.
    """
    if too_many(len(skipped), num_records, max_bad):
        population = f"the {num_records} records of --source"
        where = f"{output.list_skipped(skipped)}; repair them, or raise --max_bad"
        raise too_many_error(max_bad, _by_reason(skipped), population, where)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. An error that a user can cause prints one line and exits with status 2."""
    args = _parser().parse_args(argv)
    with one_line_errors("tokenize_images"):
        print(run(args))


if __name__ == "__main__":
    set_up_program()
    main()
