"""python -m janus_jax.data.tokenize_images: the tokens of images to be drawn, computed once.

Training on them need not run the image tokenizer. Every generation record is written again with
`indices` in place of its image; records of other kinds, and those that have indices already, are
copied.

The output is a folder of shards, each of as many records of the source (class_folder: of files
named after the records). Each finished shard has a report in its folder .tokenize_images, and a run
goes on behind the last one. Records that nothing could be made of are listed there too.
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
from janus_jax.data.reading import Source, prepared_image
from janus_jax.data.records import BadRecord, Record
from janus_jax.data.skipped import refusal, told, too_many
from janus_jax.data.sources import FORMATS, open_source
from janus_jax.data.writers import SUFFIXES, write_records
from janus_jax.flags import OneLineParser, device_memory_errors, one_line_errors, set_up_program
from janus_jax.paths import atomic_write, check_local, locked, write_file
from janus_jax.processing.images import preprocess_generation
from janus_jax.processing.json_files import read_json
from janus_jax.progress import Progress

Skipped = dict[str, str]  # record (where it is), reason and detail

if TYPE_CHECKING:
    from janus_jax.models.vq import VQ

_REPORTS = ".tokenize_images"
_MANIFEST = "manifest.json"
_LOCK = "lock"
_SKIPPED = "skipped.jsonl"  # with a dot in its path, or a source of JSONL files would read it
_THREADS = 16  # that read and decode images while the device encodes others

_EXAMPLE = """example:
  python -m janus_jax.data.tokenize_images --model deepseek-ai/Janus-Pro-1B \\
      --source tar:photos --output arrayrecord:photos_tokens
"""


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "tokenize_images",
        prog="python -m janus_jax.data.tokenize_images",
        description="Replace the images of generation records by their tokens. "
        "The same command goes on where it was interrupted.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, formats = parser.add_argument, ", ".join(FORMATS)
    place = dict(required=True, type=_format_and_path)
    add("--model", required=True, metavar="PATH", help="checkpoint folder or Hugging Face hub id")
    add("--source", **place, metavar="FORMAT:PATH", help=f"records; FORMAT is one of {formats}")
    add("--output", **place, metavar="FORMAT:FOLDER", help="where the records with tokens go")
    add("--batch_size", type=int, default=64, metavar="N", help="images encoded at once (64)")
    add("--shard_size", type=int, default=1000, metavar="N", help="records of a shard (1000)")
    most = "part of the records that may be skipped (0.05)"
    add("--max_bad", type=float, default=0.05, metavar="PART", help=most)
    add("--image_root", metavar="FOLDER", help="what image paths of jsonl start from")
    add("--class_names", metavar="FILE", help='lines "FOLDER NAME, ..." for class_folder')
    add("--count", type=int, metavar="N", help="records of scenes")
    add("--seed", type=int, metavar="N", help="of scenes")
    return parser


def _format_and_path(text: str) -> tuple[str, Path]:
    format, colon, path = text.partition(":")
    if not (format in FORMATS and colon and path):
        rule = f"must be FORMAT:PATH with one of {', '.join(FORMATS)}"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    return format, Path(path)


class Encoder:
    """Images in one after the other, their tokens out together, encoded in equal batches.

    While the device works on one batch the next is filled.
    """

    def __init__(self, vq: "VQ", image_size: int, batch_size: int):
        self.image_size = image_size
        self._vq, self._batch_size = vq, batch_size
        self._waiting: list[np.ndarray] = []
        self._encoded: list[Any] = []

    def add(self, pixels: np.ndarray) -> None:
        """pixels: float32[S, S, 3] in [-1, 1]."""
        self._waiting.append(pixels)
        if len(self._waiting) == self._batch_size:
            self._encode()

    def finish(self) -> np.ndarray:
        """int32[N, T] of all images since the last call, in their order.

        Raises ValueError if the tokenizer's latents are not finite.
        """
        from janus_jax.generation.codec import check_encoded

        number = len(self._encoded) * self._batch_size + len(self._waiting)
        if self._waiting:
            self._encode()
        encoded, self._encoded = self._encoded, []
        indices = np.concatenate([np.asarray(part) for part in encoded] or [[]])[:number]
        return check_encoded(indices, self._vq)

    def _encode(self) -> None:
        from janus_jax.generation.codec import encode_pixels

        if self._encoded:  # or batches would queue up in memory
            self._encoded[-1].block_until_ready()
        shape = self._batch_size, self.image_size, self.image_size, 3
        batch = np.zeros(shape, np.float32)
        batch[: len(self._waiting)] = self._waiting
        self._waiting = []
        self._encoded.append(encode_pixels(self._vq, batch))


def _read(
    source: Source, numbers: range, image_size: int
) -> Iterator[tuple[Record | BadRecord, np.ndarray | None]]:
    """The records of these numbers, with the pixels of those to be encoded."""
    import grain  # takes seconds

    prepare = functools.partial(preprocess_generation, size=image_size)

    def read(number: int) -> tuple[Record | BadRecord, np.ndarray | None]:
        record = source[number]
        if isinstance(record, BadRecord) or record.kind != "generation" or not record.images:
            return record, None
        try:
            return record, prepared_image(record.images[0], prepare)
        except BadRecord as bad:
            return BadRecord(bad.reason, bad.detail, record.where), None

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(dataset.to_iter_dataset(options))


def tokenize(
    source: Source, numbers: range, encoder: Encoder
) -> tuple[list[Record], int, list[BadRecord]]:
    """The records of these numbers with tokens, how many were encoded, and those left out."""
    records, places, bad = [], [], []
    for record, pixels in _read(source, numbers, encoder.image_size):
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        if pixels is not None:
            places.append(len(records))
            encoder.add(pixels)
        records.append(record)
    for place, indices in zip(places, encoder.finish(), strict=True):
        records[place] = dataclasses.replace(records[place], images=(), indices=indices)
    return records, len(places), bad


@dataclasses.dataclass(frozen=True)
class Output:
    """A folder of shards, and the reports of those that are finished."""

    format: str
    folder: Path
    shard_size: int

    def check(self) -> None:
        """Raises ValueError where there is something else already, and where there is no disk."""
        check_local("--output", self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output must name a folder, {self.folder} is a file")
        if not (self.folder / _REPORTS / _MANIFEST).is_file() and not self._holds_no_shard():
            raise ValueError(f"--output must be a new folder or one to go on with: {self.folder}")

    def alone(self) -> contextlib.AbstractContextManager:
        """Raises ValueError if another process writes to the folder."""
        return locked(self.folder, f"{_REPORTS}/{_LOCK}")

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Notes what the folder is made of. Raises ValueError if it was begun with other things."""
        path = self.folder / _REPORTS / _MANIFEST
        if self._holds_no_shard():  # nothing that it must agree with
            for left in path.parent.glob(".*"):  # of a run that was killed
                left.unlink()
            _write_json(path, manifest)
        begun = read_json(path)
        for name in {**begun, **manifest}:
            if manifest.get(name) != begun.get(name):
                was = f"{self.folder} was begun with {name} {begun.get(name)}"
                raise ValueError(f"{was} and must be gone on with so, got {manifest.get(name)}")

    def _holds_no_shard(self) -> bool:
        """Whether there is nothing but what a run writes before its first shard, whole or not."""
        reports = self.folder / _REPORTS
        names = [path.name.removeprefix(".") for path in reports.glob("*")]
        early = all(name.startswith((_MANIFEST, _SKIPPED, _LOCK)) for name in names)
        return early and set(self.folder.glob("*")) <= {reports}

    def report(self, shard: int) -> dict[str, Any] | None:
        """The arguments that `write` got for a finished shard.

        Raises ValueError for a report that write did not write.
        """
        path = self._report_path(shard)
        if not path.is_file():
            return None
        report = read_json(path)
        if not _is_report(report):
            rule = "must state the integers encoded and copied, and the list skipped"
            raise ValueError(f"{path} {rule}; delete it to write its shard again")
        return report

    def write(
        self, shard: int, records: Sequence[Record], encoded: int, skipped: Sequence[Skipped]
    ) -> None:
        """Writes a shard, and then its report."""
        path = self.folder
        if self.format in SUFFIXES:
            path = self.folder / f"shard-{shard:05d}{SUFFIXES[self.format]}"
            for left in self.folder.glob(f".{path.name}.*"):  # of a run that was killed
                left.unlink()
        write_records(self.format, path, records, first=shard * self.shard_size)
        report = dict(encoded=encoded, copied=len(records) - encoded, skipped=skipped)
        _write_json(self._report_path(shard), report)

    def list_skipped(self, skipped: Sequence[Skipped]) -> Path:
        """Writes the list, or removes that of a run before; returns its path."""
        path = self.folder / _REPORTS / _SKIPPED
        if not skipped:
            path.unlink(missing_ok=True)
            return path
        with atomic_write(path) as file:
            file.writelines(json.dumps(one).encode() + b"\n" for one in skipped)
        return path

    def conclude(self, shards: int, skipped: Sequence[Skipped]) -> str:
        """Lists what was skipped; returns a line about all shards."""
        reports = [self.report(shard) for shard in range(shards)]
        encoded, copied = (sum(one[name] for one in reports) for name in ("encoded", "copied"))
        line = f"{self.folder}: {encoded} images tokenized, {copied} records copied"
        listed = self.list_skipped(skipped)
        if not skipped:
            return f"{line}, 0 skipped"
        return f"{line}, {len(skipped)} skipped ({told(_by_reason(skipped))}), listed in {listed}"

    def _report_path(self, shard: int) -> Path:
        return self.folder / _REPORTS / f"{shard:05d}.json"


def _is_report(report: Mapping[str, Any]) -> bool:
    counts, skipped = [report.get("encoded"), report.get("copied")], report.get("skipped")
    return (
        all(type(count) is int for count in counts)
        and isinstance(skipped, list)
        and all(isinstance(one, dict) and isinstance(one.get("reason"), str) for one in skipped)
    )


def _write_json(path: Path, value: Mapping) -> None:
    write_file(path, json.dumps(value, indent=2).encode() + b"\n")


def _fingerprint(vq: "VQ") -> str:
    """Tells image tokenizers with other parameters apart."""
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
    """Does what the flags say, and returns a line about it."""
    from janus_jax import sharding
    from janus_jax.generation import compile_cache, loading
    from janus_jax.interop.load import load_vq, open_folder

    sharding.check_devices()
    for name in ("batch_size", "shard_size"):
        checks.check_count(f"--{name}", getattr(args, name))
    if not 0 <= args.max_bad < 1:
        raise ValueError(f"--max_bad must be at least 0 and below 1, got {args.max_bad}")
    options = _source_options(args)
    format, path = args.source
    source = open_source(format, path, **options)
    output = Output(*args.output, args.shard_size)
    output.check()
    compile_cache.enable()
    model = open_folder(loading.find_folder(args.model))
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
    # the time left follows from what comes after the first shard, for which a program is compiled
    with output.alone(), Progress("tokenizing", " records", warm_up=1) as progress:
        output.begin(manifest)
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
        skipped += (bad_lines := [_described(one) for one in bad])
        _check_skipped(output, skipped, len(source), max_bad)
        output.write(shard, records, encoded, bad_lines)
        progress(numbers.stop, len(source))
    _check_skipped(output, skipped, len(source), max_bad)
    return output.conclude(len(starts), skipped)


def _described(bad: BadRecord) -> Skipped:
    return dict(record=bad.where, reason=bad.reason, detail=bad.detail)


def _by_reason(skipped: Sequence[Skipped]) -> collections.Counter[str]:
    return collections.Counter(one["reason"] for one in skipped)


def _check_skipped(
    output: Output, skipped: Sequence[Skipped], records: int, max_bad: float
) -> None:
    """Raises ValueError if too many of the source's records are skipped.

    By no other rule than that of all records: they come in the order of the files, where bad ones
    often stand side by side, and are cheap to leave out.
    """
    if too_many(len(skipped), records, max_bad):
        listed = output.list_skipped(skipped)
        raise refusal(max_bad, _by_reason(skipped), f"the {records} of --source", listed)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; what a user can cause ends in one line and status 2."""
    args = _parser().parse_args(argv)
    with one_line_errors("tokenize_images"):
        print(run(args))


if __name__ == "__main__":
    set_up_program()
    main()
